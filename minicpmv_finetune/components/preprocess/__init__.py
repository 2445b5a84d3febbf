"""Step 2: slice pictures and tokenise conversations once, into Parquet shards."""
