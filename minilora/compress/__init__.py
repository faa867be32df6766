"""Compression: smaller models, by learning from a large one or by leaving out what matters least.

Plain functions on modules and tensors; the flags that use them are in tasks/teacher.py and
commands/compression.py.

distill      a student's loss: a CE(labels) + (1 - a) KL(teacher || student), softened by T
             (Hinton et al. 2015)
prune        single weights become zero and stay zero; the file zips better, no work is saved
             (Zhu and Gupta 2017)
structured   whole MLP units are taken out; the model is really smaller and faster
             (Molchanov et al. 2017)
measure      the sizes that are worth quoting: parameters, stored and zipped bytes, seconds

LoRA repairs a structured model: the update is trained on what is left, and then merged.
"""
