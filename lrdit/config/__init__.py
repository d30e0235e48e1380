"""The schema of all config fields, and the command line that sets them."""
