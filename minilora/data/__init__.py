"""Data: where pictures, questions and labels come from, and how they become batches.

Files here are strangers' files: a path may not lead out of the data folder, a header is read before
pixels are decoded, and what is broken is named or counted, never skipped in silence. Randomness is
a function of (seed, epoch, item), so that the number of workers and an interruption change no bit.
No model is known here.

Three doors, each one call that takes a --data-dir in any format:
sets           load_classification: class folders, tables, shapes, shards -> Splits
vqa_sets       load_vqa: VQA v2 files, scenes, shards -> VQASplits; answers become classes
choice_sets    load_choices: Visual7W files, tables, scenes -> ChoiceSplits
unlabelled     training rows without labels beside those of the first two doors, for a teacher

Behind them four drawers, each of which imports only those above it:
pictures/      images (one file -> one RGB picture, or a reason), folder (class folders; Sample,
               Split, Splits), tables (csv), transforms (picture -> tensor), loader (data set,
               seeded augmentation, batches), batch_augment (whole batches on the device)
generated/     shapes, scenes with questions and choices, captions, sentences: nothing to download
questions/     vqa2 and vqa_batches; choices, their readers visual7w and choice_csv, choice_batches
shards/        pictures and questions, decoded and resized once: files, pictures, questions
"""
