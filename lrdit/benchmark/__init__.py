"""The speed of training and sampling of each arm, compared with its FLOPs."""
