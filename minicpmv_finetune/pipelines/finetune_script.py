"""A replacement for the published finetune.py in your own launch script.

    torchrun $DISTRIBUTED_ARGS -m minicpmv_finetune.pipelines.finetune_script --data_path train.json …

The flags are the published ones. The data may be raw JSON: the first process of each machine validates and prepares
it, and the others wait. `minicpmv-finetune train` does the same and starts torchrun itself.
"""

import os
import sys
from datetime import timedelta
from typing import cast

from torch import distributed

from minicpmv_finetune import environment
from minicpmv_finetune.components.train.arguments import Arguments
from minicpmv_finetune.components.train.finetune import main
from minicpmv_finetune.errors import RetryableError, UserError, end_process

from .raw_data import prepare_data, with_prepared_data


def run(flags: list[str]) -> None:
    """Prepare raw data once per machine, then train."""
    os.environ.setdefault(environment.ALLOCATOR.name, environment.ALLOCATOR.read())
    try:
        # Every process parses the flags, because under torchrun this initializes the process group together.
        flags = with_prepared_data(flags, prepare=_prepare_once_per_machine)
    except (UserError, RetryableError) as error:
        end_process(error)
    main(flags)


def _prepare_once_per_machine(arguments: Arguments) -> None:
    if environment.LOCAL_RANK.read() == "0":
        prepare_data(arguments)
    if distributed.is_initialized():
        # A separate group, because NCCL's times out sooner than a large dataset is prepared.
        group = distributed.new_group(backend="gloo", timeout=timedelta(days=7))
        distributed.monitored_barrier(cast(distributed.ProcessGroup, group), timedelta(days=7))


if __name__ == "__main__":
    run(sys.argv[1:])
