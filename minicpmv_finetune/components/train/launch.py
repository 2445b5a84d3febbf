"""Start torchrun with one process a device, and pass on how it ended.

torchrun runs inside this process (its own `run` function), so a signal sent here reaches its agent, which passes it on
to the workers and waits for them; and a worker's exit code is known, which torchrun's command line would turn into 1.
"""

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from minicpmv_finetune import environment
from minicpmv_finetune.errors import USER_ERROR_EXIT, RetryableError, UserError

from .worker_exit import Place, read_places

WORKER = "minicpmv_finetune.components.train.finetune"


def launch(flags: Sequence[str], processes: int | None = None) -> None:
    """Train on this machine's devices, alone or as one of the nodes of a TrainJob.

    Args:
        flags: of the training script.
        processes: by default one for each GPU, or one without any; a TrainJob that names a number is obeyed.

    Raises:
        UserError: a worker found a mistake only the user can mend.
        RetryableError: a worker met a fault that may be gone next time.
        SystemExit: a worker failed otherwise (its exit code), or signal n ended the training (128 + n).
    """
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    wanted = environment.PROCESSES_A_NODE.read()
    processes = processes or (int(wanted) if wanted.isdigit() else max(torch.cuda.device_count(), 1))
    # Each process computes with its share of the cores; torchrun alone would give each a single one.
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // processes, 1)))

    # Threads that wait for each other spin first, by default for so long that on a busy machine they take the cores
    # from whatever else runs there. On two cores, seconds of the same steps alone and beside two busy processes:
    # 10.9 and 61 by default, 16.9 and 23 never spinning (OMP_WAIT_POLICY=PASSIVE), 11.7 and 24 spinning so little.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

    # Else processes that are started again find the addresses of those before them, in the store of their agent.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    # The worker's own traceback or sentence is what a reader needs; torchrun's report of it would bury that.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    alone = [] if environment.NODES.name in os.environ else ["--standalone"]
    if not {environment.NODES.name, environment.MAX_RESTARTS.name} & set(os.environ):
        alone.append("--max-restarts=3")
    options = [*alone, f"--nproc-per-node={processes}", "-m", WORKER, *flags]
    with tempfile.TemporaryDirectory() as folder:
        sentence = Path(folder) / "sentence"
        os.environ[environment.WORKER_EXIT_FOLDER.name] = folder
        try:
            run(parse_args(options))
        except SignalException as stopped:
            # The workers have finished their step and kept it, or were too long about it.
            if sentence.exists():
                raise RetryableError(sentence.read_text()) from None
            raise SystemExit(128 + int(stopped.sigval)) from None
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            code = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
            if sentence.exists():
                kind = UserError if code == USER_ERROR_EXIT else RetryableError
                raise kind(sentence.read_text()) from None
            print(f"error: {_how_it_ended(rank, failure.exitcode, read_places(Path(folder)))}", file=sys.stderr)
            raise SystemExit(code) from None
        finally:
            del os.environ[environment.WORKER_EXIT_FOLDER.name]


def _how_it_ended(rank: int, code: int, places: Sequence[Place]) -> str:
    if code != -signal.SIGKILL:
        return f"training process {rank} ended with exit code {code if code > 0 else 128 - code}."
    step = next((f" in step {place.step}" for place in places if place.rank == rank), "")
    return (
        f"training process {rank} was killed (signal 9){step}, as Linux does when memory runs out; give the pod "
        "more memory, or lower --per_device_train_batch_size or --dataloader_num_workers."
    )
