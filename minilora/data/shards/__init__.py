"""Data prepared once: uint8 pictures (and token ids) in safetensors files with a checked index."""
