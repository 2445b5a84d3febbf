"""Names that 0.1.0 gave to modules, for what was compiled or written down then.

A compiled pipeline holds the source of its steps, and with it the names of the modules that they import; a launch
script or a TrainJob names modules on its command line. Both keep working: an old name is the new module itself, not a
second copy of it, so that an error raised in one is caught in the other. Nothing in this project uses an old name.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_loader
from types import CodeType, ModuleType

_PACKAGE = "minicpmv_finetune"
MOVED = {
    "components.attempt": "permanent_errors",
    "components.errors": "errors",
    "components.picture_codec": "shards.codecs",
    "components.registry": "tracking.registry",
    "components.samples": "data.samples",
    "components.storage": "storage",
    "components.tracking": "tracking.step_runs",
    "components.train.node": "components.train.trainjob_pod",
    "components.train.nodes": "components.train.trainjob",
    "components.train.train": "components.train.launch",
    "components.training_record": "reports.training_record",
    "components.verdict": "tracking.promotion_record",
    "pipelines.finetune": "pipelines.finetuning",
    "pipelines.profile": "kubeflow.profile",
    "pipelines.retrain": "pipelines.retraining",
}
"""Old name to new name, both below `minicpmv_finetune`; only what 0.1.0 let others name."""


class _Alias(Loader):
    """Loads the module of the new name under the old one."""

    def __init__(self, target: str) -> None:
        self.target = target

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(self.target)
        self._own_spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Give the module back its own specification; it was executed under its own name."""
        module.__spec__ = self._own_spec

    def get_code(self, fullname: str) -> CodeType | None:
        """What `python -m` runs."""
        spec = find_spec(self.target)
        code: CodeType | None = spec.loader.get_code(self.target) if spec and spec.loader else None  # type: ignore[attr-defined]
        return code


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        moved = MOVED.get(fullname.removeprefix(f"{_PACKAGE}."))
        return spec_from_loader(fullname, _Alias(f"{_PACKAGE}.{moved}")) if moved else None


def follow_old_names() -> None:
    """Let the import system find modules under the names of 0.1.0, after everything that has a file."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
