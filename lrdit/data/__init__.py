"""Datasets as random access, and batches of them."""
