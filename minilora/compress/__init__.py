"""Compression: smaller models, by learning from a large one or by leaving out what matters least.

Functions on modules and tensors; their flags are in tasks/teacher.py and commands/compression.py.

distill      a student's loss: labels and a teacher's softened answers (Hinton et al. 2015)
prune        single weights become zero: the file zips better, no work is saved (Zhu and Gupta 2017)
structured   whole MLP units go: really smaller and faster (Molchanov et al. 2017); LoRA repairs it
measure      sizes worth quoting: parameters, stored and zipped bytes, seconds
"""
