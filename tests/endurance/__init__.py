"""Long runs and faults: `python -m tests.endurance --help`."""
