"""The schema of all fields, and the command line that fills it in."""
