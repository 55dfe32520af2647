"""Budgets before anything runs: calibration statistics in, shares of layers, counts or bits out."""
