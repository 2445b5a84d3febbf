"""How the steps are chained: the pipelines, the run on this machine, and the demonstration.

`from minicpmv_finetune.pipelines import finetune, retrain` gives the pipelines, as users of the kfp SDK expect; kfp is
imported only then, so that the command line starts at once.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .finetuning import finetune as finetune
    from .retraining import retrain as retrain


def __getattr__(name: str) -> Any:
    if name == "finetune":
        from .finetuning import finetune

        return finetune
    if name == "retrain":
        from .retraining import retrain

        return retrain
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
