"""Spectra of trained weights and gradients by timestep, and rank truncation."""
