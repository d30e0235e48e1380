"""Recipes, one for each data set; `--config` names one of them by its path."""
