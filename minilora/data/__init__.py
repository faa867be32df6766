"""Where pictures and their labels come from.

images     one file -> one RGB picture, or a reason           transforms  picture -> tensor
folder     class folders; Sample, Split, Splits                tables      csv files
shapes     pictures drawn on the fly                           scenes      scenes with questions, choices, captions
sets       load_classification: any of these by one call       loader      data set, seeded augmentation, batches
choices    multiple choice: Question, ChoiceSplit, load_choices; from visual7w, choice_csv and generated scenes
choice_batches  their texts as token ids, their batches        captions    what the nano CLIP is trained on
download   the public archives
"""
