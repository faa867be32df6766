"""The files of checkpoints: names, one key table per family, config.json, downloads."""
