"""Shards of prepared samples: their format, image codecs, the encoding of a sample, and the cache of local copies."""
