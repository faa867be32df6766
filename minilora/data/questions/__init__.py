"""Questions about pictures: open-ended (vqa2, vqa_batches) or with choices (choices, its readers
visual7w and choice_csv, choice_batches).
"""
