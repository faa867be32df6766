"""Data prepared once: uint8 pictures (and token ids) in safetensors files with an index
that is checked.
"""
