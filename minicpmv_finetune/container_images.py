"""Which container images the components run in.

`MINICPMV_FINETUNE_REGISTRY` and `MINICPMV_FINETUNE_TAG` choose others when the pipeline is compiled.
"""

import os
from importlib.metadata import version

_REGISTRY = os.environ.get("MINICPMV_FINETUNE_REGISTRY", "minicpmv-finetune")
_TAG = os.environ.get("MINICPMV_FINETUNE_TAG", version("minicpmv-finetune"))

DATA_IMAGE = f"{_REGISTRY}/data:{_TAG}"
TRAINER_IMAGE = f"{_REGISTRY}/trainer:{_TAG}"
