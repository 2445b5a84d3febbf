"""Step 4: merge the adapter into its base, and prove that the merged folder answers alike."""
