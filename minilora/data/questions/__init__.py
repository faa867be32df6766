"""Questions about pictures: open-ended (vqa2, vqa_batches) or with choices (the other modules)."""
