"""What every mode stands on: errors, devices and processes, files, logs; nothing of ours below."""
