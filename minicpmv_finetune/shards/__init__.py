"""The prepared samples on disk: format, image codecs, encoding of a sample, and the cache of verified copies."""
