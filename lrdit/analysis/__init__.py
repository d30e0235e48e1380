"""What trained factors and gradients look like by timestep."""
