"""Data drawn on the fly, with nothing to download: shapes, scenes, captions, sentences."""
