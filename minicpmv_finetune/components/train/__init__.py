"""Step 3: fine-tune on the shards with torchrun, and save a PEFT adapter."""
