"""Step 1: find every sample that could not be trained on, and name it."""
