"""Step 5: let base and tuned model answer held-out questions, and compare."""
