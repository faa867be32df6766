"""Labelled pictures: a file becomes an RGB picture, folders and tables a set, a set batches."""
