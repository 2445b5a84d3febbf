"""Takes the place of the published finetune.py in a launch script of one's own.

    torchrun $DISTRIBUTED_ARGS -m minicpmv_finetune.pipelines.finetune_script --data_path train.json …

The flags are the published ones, raw JSON included: the first process of a machine validates and prepares it, the
others wait. `minicpmv-finetune train` does the same and starts torchrun itself.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

from ..components.errors import RetryableError, UserError, end_process
from ..components.train.finetune import main
from .raw_data import prepared_flags, with_prepared_data


def run(flags: list[str]) -> None:
    """Prepare raw data once a machine, then train."""
    try:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            flags = with_prepared_data(flags)
        else:
            # A file of this very start of torchrun: nothing that an earlier one left is taken for ready.
            run = os.environ.get("TORCHELASTIC_RUN_ID", "run") + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            ready = Path(tempfile.gettempdir()) / f"minicpmv-prepared-{run}"
            if os.environ.get("LOCAL_RANK", "0") == "0":
                with_prepared_data(flags)
                ready.touch()
            while not ready.exists():
                time.sleep(0.2)
            flags = prepared_flags(flags)
    except (UserError, RetryableError) as error:
        end_process(error)
    main(flags)


if __name__ == "__main__":
    run(sys.argv[1:])
