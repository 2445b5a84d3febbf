"""The servers whose forks the steps of a run on this machine are.

One imports what every step needs, and forks at once for steps that need no torch. The other one is its fork, imports
torch and what needs it meanwhile, and forks for the other steps. Where an earlier attempt has finished all of those, it
starts only if one of them is to be done again after all: such a run needs neither torch nor the time to import it.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from typing import Self

from minicpmv_finetune.fork_server import ForkServer

FIRST_IMPORTS = ("minicpmv_finetune.pipelines.step_imports",)
"""What all steps import."""
TORCH_IMPORTS = (
    "torch.distributed.run",
    "minicpmv_finetune.components.train.launch",
    "minicpmv_finetune.components.train.finetune",
    "minicpmv_finetune.components.merge.parity_check",
    "minicpmv_finetune.components.evaluate.evaluate",
)
"""What the steps import that need torch."""
_WITHOUT_TORCH = ("validate-data", "preprocess", "plan-retraining", "register", "notify")
_INTERVAL = 0.1  # seconds between two looks whether the run was stopped


class StepServers:
    """Both servers, which end with a block.

    Attributes:
        first: The server without torch.
    """

    def __init__(self, expected: Iterable[str]) -> None:
        """Start the first server.

        Args:
            expected: Names of the steps that are expected to be done.
        """
        self._torch_is_expected = not set(expected) <= set(_WITHOUT_TORCH)
        self._with_torch: ForkServer | None = None
        self._open = ExitStack()
        self.first = self._open.enter_context(ForkServer(FIRST_IMPORTS))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def of(self, step: str, is_stopped: Callable[[], bool]) -> ForkServer:
        """The server for a step, as soon as it has imported what the step needs; the first one in a stopped run."""
        needs_torch = step not in _WITHOUT_TORCH
        if not self._with_torch and (needs_torch or self._torch_is_expected):
            with suppress(ConnectionError):
                self._with_torch = self._open.enter_context(ForkServer(TORCH_IMPORTS, self.first))
        if not self._with_torch or not needs_torch:
            return self.first
        while not self._with_torch.wait_for_imports(_INTERVAL):
            if is_stopped():
                return self.first
        return self._with_torch
