"""What each pod of a TrainJob runs: torchrun with this machine's processes, and then the result goes to the store.

    python -m minicpmv_finetune.components.train.trainjob_pod OUTPUT_URI --data_path s3://…/shards …

Kubeflow Trainer says in PET_* variables how many nodes there are and where they meet. How the pod ended stands in its
exit code, and the sentence in its termination message, where the step that follows the TrainJob reads it.
"""

import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from minicpmv_finetune import environment, storage
from minicpmv_finetune.errors import RetryableError, UserError, end_process
from minicpmv_finetune.reports.training_record import RECORD_FILE

from .launch import launch

TERMINATION_MESSAGE = Path("/dev/termination-log")
"""Where Kubernetes looks for a container's last words, unless its manifest says otherwise."""


def run_node(output_uri: str, flags: Sequence[str], termination_message: Path = TERMINATION_MESSAGE) -> None:
    """Train as one node among several; the first one's result is uploaded.

    Args:
        output_uri: `s3://` folder that receives the result; its record comes last, and without it nothing counts.
        flags: of the training script, without an output folder.
        termination_message: receives the sentence of an error.

    Raises:
        SystemExit: with the exit code of a user's mistake or of a fault worth retrying, its sentence printed.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            trained = Path(folder) / "trained"
            launch([*flags, "--output_dir", str(trained)])
            if environment.NODE_RANK.read() == "0":
                _upload(trained, output_uri)
    except (UserError, RetryableError) as error:
        # Outside of a pod there is no such file.
        with suppress(OSError):
            termination_message.write_text(str(error))
        end_process(error)


def _upload(folder: Path, uri: str) -> None:
    def upload(path: Path) -> None:
        storage.upload_file(path, storage.join(uri, path.relative_to(folder).as_posix()))

    record = folder / RECORD_FILE
    first, *others = sorted(path for path in folder.rglob("*") if path.is_file() and path != record)
    # Alone: threads that import boto3 for the first time at once disturb each other.
    upload(first)
    with ThreadPoolExecutor(storage.FILES_AT_ONCE) as pool:
        for _ in pool.map(upload, others):
            pass
    upload(record)


if __name__ == "__main__":
    run_node(sys.argv[1], sys.argv[2:])
