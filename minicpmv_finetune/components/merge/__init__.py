"""Step 4: merge the adapter into its base, and check that the merged folder computes the same logits as both."""
