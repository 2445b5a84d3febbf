"""The eight steps that run in containers, a folder each."""
