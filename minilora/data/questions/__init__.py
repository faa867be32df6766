"""Questions about pictures, open-ended (vqa2, vqa_sets, vqa_batches) or with choices (choices
and its readers).
"""
