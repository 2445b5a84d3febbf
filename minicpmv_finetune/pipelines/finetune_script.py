"""Takes the place of the published finetune.py in a launch script of one's own.

    torchrun $DISTRIBUTED_ARGS -m minicpmv_finetune.pipelines.finetune_script --data_path train.json …

The flags are the published ones, raw JSON included: the first process of a machine validates and prepares it, the
others wait. `minicpmv-finetune train` does the same and starts torchrun itself.
"""

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
    """Prepare raw data once a machine, then train."""
    try:
        # Every process reads the flags first: under torchrun that is where they meet, each waiting for the others.
        flags = with_prepared_data(flags, prepare=_prepare_once_a_machine)
    except (UserError, RetryableError) as error:
        end_process(error)
    main(flags)


def _prepare_once_a_machine(arguments: Arguments) -> None:
    if environment.LOCAL_RANK.read() == "0":
        prepare_data(arguments)
    if distributed.is_initialized():
        # A group of its own, because NCCL's ends after a timeout that preparing a large dataset outlasts.
        group = distributed.new_group(backend="gloo", timeout=timedelta(days=7))
        distributed.monitored_barrier(cast(distributed.ProcessGroup, group), timedelta(days=7))


if __name__ == "__main__":
    run(sys.argv[1:])
