"""One module for each --mode."""
