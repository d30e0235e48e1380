"""The training step and the state, files and stages around it."""
