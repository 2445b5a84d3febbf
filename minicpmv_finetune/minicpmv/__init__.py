"""MiniCPM-V itself: generations, slicing, conversation template, batches, the models, loading and saving."""
