"""Errors, devices, processes, files and logs: the base, which imports no other lrdit package."""
