"""Data drawn on the fly: shapes, scenes with questions and captions, sentences.
Nothing to download.
"""
