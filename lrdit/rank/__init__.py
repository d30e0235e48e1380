"""Which rank is active at which timestep."""
