"""Start torchrun with one process per device, and end as the training processes ended.

torchrun runs inside this process (by its own `run` function). So a signal to this process reaches torchrun's agent,
which passes it to the training processes and waits for them; and a process's exit code is known, which torchrun's
command line would replace by 1.
"""

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from minicpmv_finetune import environment
from minicpmv_finetune.errors import USER_ERROR_EXIT, RetryableError, UserError

from .flags import check_flags
from .worker_exit import ERROR_FILE, EXIT_CODE_FILE, StepProgress, read_progress

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

WORKER = "minicpmv_finetune.components.train.worker"


def launch(flags: Sequence[str], processes: int | None = None) -> None:
    """Train on this machine's devices, alone or as one of the nodes of a TrainJob.

    Args:
        flags: Flags of the training script.
        processes: Number of training processes; by default the number that a TrainJob sets, otherwise one per GPU, or
            one if there is no GPU.

    Raises:
        UserError: A flag is wrong, or a training process found a mistake that only the user can fix.
        RetryableError: A training process met a fault that may be gone at the next attempt.
        SystemExit: A training process failed for another reason (with its exit code), or signal n ended the training
            (with 128 + n).
    """
    check_flags(flags)
    processes = processes or _process_count()
    _prepare_environment(processes)

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    # A reader needs the process's own traceback or sentence; torchrun's long report would hide it.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    options = [*_restart_options(), f"--nproc-per-node={processes}", "-m", WORKER, *flags]
    with tempfile.TemporaryDirectory() as folder:
        os.environ[environment.WORKER_EXIT_FOLDER.name] = folder
        try:
            with _without_useless_restarts(Path(folder)):
                run(parse_args(options))
        except SignalException as stopped:
            # The processes have finished their step and saved it, or took too long.
            error = Path(folder) / ERROR_FILE
            if error.exists():
                raise RetryableError(error.read_text()) from None
            raise SystemExit(128 + int(stopped.sigval)) from None
        except ChildFailedError as failed:
            _fail(failed, Path(folder))
        finally:
            del os.environ[environment.WORKER_EXIT_FOLDER.name]


def _process_count() -> int:
    import torch

    wanted = environment.PROCESSES_A_NODE.read()
    return int(wanted) if wanted.isdigit() else max(torch.cuda.device_count(), 1)


def _prepare_environment(processes: int) -> None:
    """Set the environment variables that the training processes inherit, unless they are set already."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Each process computes with its share of the cores; torchrun alone would give each a single core.
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // processes, 1)))

    # Threads that wait for each other spin first, by default for so long that on a busy machine they take the cores
    # from other processes. On two cores, seconds for the same steps alone and beside two busy processes: 10.9 and 61
    # by default, 16.9 and 23 without spinning (OMP_WAIT_POLICY=PASSIVE), 11.7 and 24 with this value.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

    # Otherwise restarted processes find the addresses of their predecessors in the store of torchrun's agent.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")


def _restart_options() -> list[str]:
    """Options of torchrun for a single machine; on several nodes they are in Kubeflow Trainer's variables."""
    options = [] if environment.NODES.read() else ["--standalone"]
    if not environment.NODES.read() and not environment.MAX_RESTARTS.read():
        options.append("--max-restarts=3")
    return options


@contextmanager
def _without_useless_restarts(folder: Path) -> Iterator[None]:
    """Keep torchrun from restarting processes that ended for a known reason, because they would end so again."""
    from torch.distributed.elastic.agent.server import RunResult, WorkerGroup
    from torch.distributed.launcher import api

    class Agent(api.LocalElasticAgent):
        """torchrun's agent, which looks for the reason of a failure."""

        def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
            result = super()._monitor_workers(worker_group)
            if result.is_failed() and (folder / EXIT_CODE_FILE).exists():
                self._remaining_restarts = 0
            return result

    original = api.LocalElasticAgent
    api.LocalElasticAgent = Agent  # type: ignore[misc]
    try:
        yield
    finally:
        api.LocalElasticAgent = original  # type: ignore[misc]


def _fail(failed: "ChildFailedError", folder: Path) -> NoReturn:
    """Raise the error that the training processes recorded, or end with the exit code of the first that failed."""
    rank, failure = failed.get_first_failure()
    code = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    error = folder / ERROR_FILE
    if error.exists():
        kind = UserError if code == USER_ERROR_EXIT else RetryableError
        raise kind(error.read_text()) from None
    print(f"error: {_describe_failure(rank, failure.exitcode, read_progress(folder))}", file=sys.stderr)
    raise SystemExit(code) from None


def _describe_failure(rank: int, code: int, progress: Sequence[StepProgress]) -> str:
    if code != -signal.SIGKILL:
        return f"training process {rank} ended with exit code {code if code > 0 else 128 - code}."
    step = next((f" in step {process.step}" for process in progress if process.rank == rank), "")
    return (
        f"training process {rank} was killed (signal 9){step}, as Linux does when memory runs out; give the pod "
        "more memory, or lower --per_device_train_batch_size or --dataloader_num_workers."
    )
