"""What the launcher starts in each training process, where FSDP2 divides the model among CPUs.

A user is refused, because accelerate would train plain DDP on a CPU. It divides a model among the devices of torch's
process group, so here it takes the group of the CPUs for one of GPUs; everything else is what a training does.
"""

import sys
from typing import Any

from minicpmv_finetune.components.train.worker import leave_out_unused


def _allow_fsdp_on_cpus() -> None:
    from accelerate.state import DistributedType, PartialState

    from minicpmv_finetune.components.train import arguments as flags

    check, create = flags._check, PartialState.__init__

    def check_without_fsdp(arguments: flags.Arguments) -> None:
        fsdp, arguments.training.fsdp = arguments.training.fsdp, None
        check(arguments)
        arguments.training.fsdp = fsdp

    def create_as_on_gpus(state: PartialState, *values: Any, **options: Any) -> None:
        create(state, *values, **options)
        if state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type = DistributedType.MULTI_GPU

    flags._check = check_without_fsdp
    PartialState.__init__ = create_as_on_gpus


if __name__ == "__main__":
    leave_out_unused(sys.argv[1:])
    from minicpmv_finetune.components.train.finetune import main

    _allow_fsdp_on_cpus()
    main(sys.argv[1:])
