"""The forward process, its targets and weights, and the solvers."""
