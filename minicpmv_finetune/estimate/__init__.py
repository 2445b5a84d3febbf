"""What a run will take, before a GPU is claimed: tokens, memory, steps and time."""
