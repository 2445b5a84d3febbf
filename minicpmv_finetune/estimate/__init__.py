"""Estimate the cost of a run before a GPU is requested: tokens, memory, steps and time."""
