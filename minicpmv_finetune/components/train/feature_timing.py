"""Whether stored features are faster than computing them again: one batch of each way is timed before the first step.

A fast GPU may run a vision tower sooner than a slow disk, such as one behind a network, returns its outputs.
"""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path

import torch

_READINGS = 3  # of which the fastest counts, because another process may interrupt some


@dataclass(frozen=True)
class Timing:
    """Seconds for one batch, summed over all processes.

    Attributes:
        images: To read and place its images.
        compute: To run the vision modules.
        read: To read the result from the disk, onto the device. (Linux writes it while the next one is computed.)
    """

    images: float = 0.0
    compute: float = 0.0
    read: float = 0.0

    def favors_store(self, passes: float, exists: bool, workers: int) -> bool:
        """Whether a store saves time.

        Args:
            passes: How often the training uses the data.
            exists: Whether the store is there already, so that nothing has to be computed.
            workers: Number of processes that prepare batches at the same time.
        """
        preparation = self.images / max(workers, 1)
        again = passes * (preparation + self.compute)
        first = 0.0 if exists else preparation + self.compute
        return first + passes * self.read / max(workers, 1) <= again

    def summed(self, device: torch.device) -> "Timing":
        """The sum over all processes, so that all of them decide alike."""
        if not torch.distributed.is_initialized():
            return self
        values = torch.tensor(astuple(self), device=device)
        torch.distributed.all_reduce(values)
        return Timing(*values.tolist())


def seconds(device: torch.device, action: Callable[[], object]) -> float:
    """How long an action takes, including what it has started on a GPU."""
    _wait_for(device)
    started = time.perf_counter()
    action()
    _wait_for(device)
    return time.perf_counter() - started


def time_reading(read: Callable[[], object], store_bytes: int, device: torch.device) -> float:
    """How long it takes to read a batch of a store, which Linux keeps in memory after its first use if it is small."""
    repetitions = _READINGS if _fits_in_memory(store_bytes) else 1
    return min(seconds(device, read) for _ in range(repetitions))


def time_disk(features: torch.Tensor, folder: Path, store_bytes: int, device: torch.device) -> float:
    """Write a batch's features to a disk, and return the seconds to read them again as a training would.

    Args:
        features: The features, on the CPU.
        folder: Folder on the disk.
        store_bytes: Size of the whole store.
        device: Where the features are needed.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".timing-") as place:
        path = Path(place) / "features"
        path.write_bytes(features.contiguous().view(-1).view(torch.uint8).numpy().tobytes())

        def read() -> None:
            mapped = torch.from_file(str(path), False, features.numel(), dtype=features.dtype)
            mapped.clone().to(device)

        if not _fits_in_memory(store_bytes) and hasattr(os, "posix_fadvise"):
            with path.open("rb+") as file:
                os.fsync(file.fileno())  # what is not on the disk yet would stay in memory
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return time_reading(read, store_bytes, device)


def _fits_in_memory(store_bytes: int) -> bool:
    """Whether a store fills less than half of the memory that Linux, and the container, have for files."""
    available = float("inf")
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = 1024 * float(next(line.split()[1] for line in lines if line.startswith("MemAvailable:")))
        available = min(available, float(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError, StopIteration):  # no Linux, no cgroup, or "max"
        pass
    return store_bytes < available / 2


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
