"""Step 5: generate the answers of base and tuned model to held-out questions, and compare them."""
