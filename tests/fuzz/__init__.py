"""Fuzzing of everything that reads files from elsewhere: `python -m tests.fuzz --help`.

Plain numpy makes the mutations, from the seed and the input's number alone, so that a finding can
be made again without a file.
"""
