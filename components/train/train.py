"""Start torchrun with one process a device, and pass on how it ended.

torchrun runs inside this process (its own `run` function), so a signal sent here reaches its agent, which passes it on to
the workers and waits for them; and a worker's exit code is known, which torchrun's command line would turn into 1.
"""

import logging
import os
import sys
from collections.abc import Sequence

from ..errors import RETRY_EXIT, USER_ERROR_EXIT

WORKER = "minicpmv_finetune.components.train.finetune"


def launch(arguments: Sequence[str], devices: int | None = None) -> int:
    """Train on this machine's devices.

    Args:
        arguments: flags of the training script.
        devices: number of processes; by default one for each GPU, or one without any.

    Returns:
        The exit code: 0, that of the worker that failed first, or 128 + n after signal n.
    """
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    processes = devices or max(torch.cuda.device_count(), 1)
    # Each process computes with its share of the cores; torchrun alone would give each a single one.
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // processes, 1)))

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    # The worker has said what is wrong; torchrun's own report of it would bury that sentence.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    options = ["--standalone", f"--nproc-per-node={processes}", "-m", WORKER, *arguments]
    try:
        run(parse_args(options))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        if code not in (USER_ERROR_EXIT, RETRY_EXIT):
            print(f"error: training process {rank} ended with exit code {code}; its traceback is above.", file=sys.stderr)
        return code
    except SignalException as signal:
        return 128 + int(signal.sigval)
    return 0
