"""How the steps are chained, and the command line.

`from minicpmv_finetune.pipelines import finetune` gives the pipeline, as a user of the kfp SDK expects, and not the
module of that name; kfp is imported only then, so that the command line starts at once.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kfp.dsl.graph_component import GraphComponent


class _Package(ModuleType):
    @property
    def finetune(self) -> "GraphComponent":
        from .finetune import finetune

        return finetune

    @finetune.setter
    def finetune(self, module: ModuleType) -> None:
        """The import system sets a submodule on its package here; the pipeline keeps the name."""


sys.modules[__name__].__class__ = _Package
