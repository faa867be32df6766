"""Data: where pictures, questions and labels come from, and how they become batches.

Files here are strangers' files: a path may not lead out of the data folder, a header is read before
pixels are decoded, and what is broken is named or counted, never skipped in silence. Randomness is
a function of (seed, epoch, item), so that the number of workers and an interruption change no bit.
No model is known here.

From the bottom: a picture, a labelled set, a batch.
images     one file -> one RGB picture, or a reason           transforms  picture -> tensor
folder     class folders; Sample, Split, Splits                tables      csv files
shapes     pictures drawn on the fly                           scenes      scenes with questions, choices, captions
sets       load_classification: any of these by one call       loader      data set, seeded augmentation, batches

Questions about pictures:
vqa2       the files of VQA v2                                 vqa_sets    load_vqa: those, shards, scenes; answers
vqa_batches  each picture and each text once in a batch        choices     load_choices, from visual7w, csv, scenes
choice_batches  the texts of all choices as token ids          choice_csv, visual7w  their files

Prepared once: picture_shards, shards (with questions), on shard_files; batch_augment is their last
step on the device.

Beside them: download (the public archives), captions and
sentences (what the bundled nano models were made from).
"""
