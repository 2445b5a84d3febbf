"""Benchmarks on public data: each task's data is fetched by name from a package registry and converted."""

from minicpmv_finetune.progress import quieten_libraries

# The libraries read these settings when they are imported, which the task and the pipeline do after this package.
quieten_libraries()
