"""Held-out losses, image features and the metrics over them."""
