"""The memory of what computes on the CPU: what is freed is used again.

glibc returns a large tensor or image to Linux as soon as it is freed, and Linux fills the pages of the next one with
zeros, one after the other. A step of a training frees and asks for the same gigabytes each time, and a worker that
prepares images for the same megabytes: slicing a photograph of 1344 × 1344 takes 10.6 instead of 13.7 ms with this, and
50 instead of 2,600 new pages. On a GPU torch keeps memory itself. docs/performance.md has more measurements.
"""

import ctypes
import os

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3

_VARIABLES = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"}

_LARGEST = 2**30  # bytes of a tensor that is part of the heap; a larger one is returned as before
# Loaded here, because a forked process of a parent with threads might wait forever for the loader's lock.
_C_LIBRARY = ctypes.CDLL(None)


def keep_freed_memory(at_most: int = 2**31 - 1) -> None:
    """Let glibc keep freed memory for this process, unless a user has set one of its variables for that.

    Where another library allocates memory, nothing changes.

    Args:
        at_most: Bytes that are kept at the end of the heap; by default as many as glibc accepts here.
    """
    mallopt = getattr(_C_LIBRARY, "mallopt", None)
    if mallopt and not os.environ.keys() & _VARIABLES:
        mallopt(_TRIM_THRESHOLD, at_most)
        mallopt(_MMAP_THRESHOLD, min(at_most, _LARGEST))
