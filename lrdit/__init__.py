"""Timestep-adaptive low-rank diffusion transformers; cheap to import, as it loads nothing."""

__version__ = "0.1.0"
