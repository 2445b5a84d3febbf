"""Step 2: slice images and tokenize conversations once, into Parquet shards."""
