"""Labelled pictures: one file -> one RGB picture; folders and tables -> a labelled set;
a set -> batches.
"""
