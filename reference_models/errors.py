"""The error that every loader in this package raises."""


class ModelError(ValueError):
    """A model, checkpoint or tokenizer that cannot be used: which file and key, and the way out."""
