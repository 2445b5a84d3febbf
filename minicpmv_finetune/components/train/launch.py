"""Start torchrun with one process per device, and end as the training processes ended.

torchrun runs inside this process (by its own `run` function). So a signal to this process reaches torchrun's agent,
which passes it to the training processes and waits for them; and a process's exit code is known, which torchrun's
command line would replace by 1.
"""

import logging
import os
import signal
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from minicpmv_finetune import environment
from minicpmv_finetune.cores import cores, share_cores
from minicpmv_finetune.errors import USER_ERROR_EXIT, RetryableError, SentenceExit, StoppedError, UserError
from minicpmv_finetune.fork_server import fork_client
from minicpmv_finetune.options import raise_mistakes
from minicpmv_finetune.terminal import print_sentence

from .flags import check_flags, find_missing_gpus, take_processes
from .worker_exit import CAUSE_FILE, ERROR_FILE, EXIT_CODE_FILE, StepProgress, read_progress, signal_name

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

WORKER = "minicpmv_finetune.components.train.worker"
_STOPPING_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


class CrashExit(SentenceExit):
    """A training process ended with an error of the program, whose traceback it printed; it would end so again."""


def launch(flags: Sequence[str], processes: int | None = None) -> None:
    """Train on this machine's devices, alone or as one of the nodes of a TrainJob.

    Args:
        flags: Flags of the training script.
        processes: Number of training processes; by default that of `--nproc_per_node`, else what a TrainJob sets,
            otherwise one per GPU, or one if there is no GPU.

    Raises:
        UserError: A flag is wrong, or a training process found a mistake that only the user can fix.
        RetryableError: A training process met a fault that may be gone at the next attempt.
        StoppedError: A signal ended the training, and its state is saved.
        SystemExit: A training process failed for another reason (with its exit code), or signal n ended the training
            (with 128 + n).
    """
    flags, wanted = take_processes(flags)
    check_flags(flags)
    raise_mistakes(find_missing_gpus(wanted))
    processes = processes or wanted or _process_count()
    _prepare_environment(processes)

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    # A reader needs the process's own traceback or sentence; torchrun's long report would hide it.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # Other signals are ignored on purpose, by nohup or for a process in the background.
    handled = [number for number in _STOPPING_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    signals = f"--signals-to-handle={','.join(number.name for number in handled)}"
    options = [*_restart_options(), signals, f"--nproc-per-node={processes}", "-m", WORKER, *flags]
    with tempfile.TemporaryDirectory() as folder:
        os.environ[environment.WORKER_EXIT_FOLDER.name] = folder
        handlers = {number: signal.getsignal(number) for number in handled}
        try:
            with _without_useless_restarts(Path(folder)), _forked_workers():
                run(parse_args(options))
        except SignalException as stopped:
            _end_stopped(signal.Signals(stopped.sigval), Path(folder))
        except ChildFailedError as failed:
            _fail(failed, Path(folder))
        finally:
            # torchrun leaves its own, which raise an exception of its own.
            for number, handler in handlers.items():
                signal.signal(number, handler)
            del os.environ[environment.WORKER_EXIT_FOLDER.name]


def _process_count() -> int:
    import torch

    wanted = environment.PROCESSES_A_NODE.read()
    return max(int(wanted) if wanted.isdigit() else torch.cuda.device_count(), 1)


def _prepare_environment(processes: int) -> None:
    """Set the environment variables that the training processes inherit, unless they are set already."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    share_cores()
    # Each process computes with its share of the cores; torchrun alone would give each a single core.
    if environment.THREADS.read() in {"", str(cores())}:  # `share_cores` may have set those of a single process
        os.environ[environment.THREADS.name] = str(max(cores() // processes, 1))
    os.environ.setdefault(environment.ALLOCATOR.name, environment.ALLOCATOR.read())

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


@contextmanager
def _forked_workers() -> Iterator[None]:
    """Let torchrun's training processes be forks, if this process is one."""
    if (client := fork_client()) is None:
        yield
        return
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    original = subprocess_handler.Popen

    def start(args: Sequence[str], env: Mapping[str, str], **options: Any) -> Any:
        _, _, _, module, *arguments = args  # python -u -m MODULE …
        if not options.get("stdout") and not options.get("stderr"):  # files that torchrun's own settings ask for
            with suppress(ConnectionError):
                return client.start(module, arguments, env, own_session=True)
        return original(args, env=env, **options)

    subprocess_handler.Popen = start  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        subprocess_handler.Popen = original  # type: ignore[misc]


def _end_stopped(number: signal.Signals, folder: Path) -> NoReturn:
    """End after a signal: the processes have finished a step and saved it, or there was none, or it took too long."""
    error = folder / ERROR_FILE
    if error.exists():
        sentence = error.read_text()
    else:
        steps = [process.step for process in read_progress(folder)]
        place = f"in step {max(steps)}, which took too long to finish" if steps else "before its first step"
        sentence = (
            f"Training was stopped by {signal_name(number)} {place}; running the same command again continues from "
            "the newest checkpoint, if there is one."
        )
    if error.exists() and number != signal.SIGINT:
        raise StoppedError(sentence) from None
    print_sentence(f"error: {sentence}")
    raise SystemExit(128 + number) from None


def _fail(failed: "ChildFailedError", folder: Path) -> NoReturn:
    """Raise the error that the training processes recorded, or end with the exit code of the one that failed."""
    # Of the processes that ended first, one that was killed is the cause, and what the others report its consequence.
    # torchrun kills those that are left, a frozen one half a minute later.
    first = min(failure.timestamp for failure in failed.failures.values())
    rank, failure = min(
        failed.failures.items(),
        key=lambda item: (item[1].timestamp > first + 1, item[1].exitcode > 0, item[1].timestamp),
    )
    code = failure.exitcode
    error, recorded = folder / ERROR_FILE, folder / EXIT_CODE_FILE
    if error.exists() and code > 0:
        is_mistake = recorded.exists() and recorded.read_text() == str(USER_ERROR_EXIT)
        raise (UserError if is_mistake else RetryableError)(error.read_text()) from None
    cause = folder / CAUSE_FILE
    sentence = _describe_failure(rank, code, read_progress(folder), cause.read_text() if cause.exists() else "")
    print_sentence(f"error: {sentence}")
    if code > 0 and recorded.exists():
        raise CrashExit(code, sentence) from None
    raise SentenceExit(code if code > 0 else 128 - code, sentence) from None


def _describe_failure(rank: int, code: int, progress: Sequence[StepProgress], cause: str) -> str:
    if code != -signal.SIGKILL:
        ended = f"training process {rank} ended with exit code {code if code > 0 else 128 - code}"
        return f"{ended} ({cause.rstrip('.')})." if cause and code > 0 else f"{ended}."
    step = next((f" in step {process.step}" for process in progress if process.rank == rank), "")
    return (
        f"training process {rank} was killed (signal 9){step}, as Linux does when memory runs out; give the pod "
        "more memory, or lower --per_device_train_batch_size or --dataloader_num_workers."
    )
