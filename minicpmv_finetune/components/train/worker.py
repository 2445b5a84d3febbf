"""What the launcher starts in each training process.

torchrun restarts every process that failed. If the predecessor ended for a known reason, this one ends before it
imports torch and transformers, which takes seconds.
"""

import signal
import sys

from .worker_exit import repeat_exit

if __name__ == "__main__":
    # Until the training handles it, Ctrl-C ends this process without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    repeat_exit()
    from .finetune import main

    main(sys.argv[1:])
