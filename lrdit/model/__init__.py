"""The low-rank diffusion transformer, its cost, and the VAE around it."""
