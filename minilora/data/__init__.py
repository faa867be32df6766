"""Where pictures and their labels come from.

images     one file -> one RGB picture, or a reason           transforms  picture -> tensor
folder     class folders; Sample, Split, Splits                tables      csv files
shapes     pictures drawn on the fly                           scenes      scenes with questions, choices, captions
sets       load_classification: any of these by one call       loader      data set, seeded augmentation, batches
download   the public archives
"""
