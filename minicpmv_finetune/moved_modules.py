"""Names that modules had in 0.1.0, for pipelines and scripts that were written for that version.

A compiled pipeline contains the source of its steps, and with it the names of the modules that they import; a launch
script or a TrainJob names modules on its command line. Both keep working: the old name leads to the new module itself,
not to a second copy of it, so that an error raised under one name is caught under the other. Nothing in this project
uses an old name.
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
"""Old name to new name, both below `minicpmv_finetune`; only modules that others could name in 0.1.0."""


class _Alias(Loader):
    """Loads the module of the new name under the old name."""

    def __init__(self, target: str) -> None:
        self.target = target

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(self.target)
        self._own_spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Restore the module's own specification; the module was executed under its new name."""
        module.__spec__ = self._own_spec

    def get_code(self, fullname: str) -> CodeType | None:
        """The code that `python -m` runs."""
        spec = find_spec(self.target)
        code: CodeType | None = spec.loader.get_code(self.target) if spec and spec.loader else None  # type: ignore[attr-defined]
        return code


class _Finder(MetaPathFinder):
    """Finds a module by its old name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        moved = MOVED.get(fullname.removeprefix(f"{_PACKAGE}."))
        return spec_from_loader(fullname, _Alias(f"{_PACKAGE}.{moved}")) if moved else None


def follow_old_names() -> None:
    """Let the import system find modules under their names of 0.1.0, if no file has such a name."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
