"""Which container images the components run in.

A component names an image of this version. Where a pipeline is built, `MINICPMV_FINETUNE_REGISTRY` and
`MINICPMV_FINETUNE_TAG` choose another registry or tag; images that a profile names win over both, and the option
`--registry` over everything.
"""

from importlib.metadata import version

from minicpmv_finetune import environment

_VERSION = version("minicpmv-finetune")
DATA_IMAGE = f"{environment.REGISTRY.default}/data:{_VERSION}"
TRAINER_IMAGE = f"{environment.REGISTRY.default}/trainer:{_VERSION}"


def chosen(image: str) -> str:
    """The image that is used in place of a component's, as the environment decides now."""
    return named(variant(image), environment.REGISTRY.read())


def named(variant: str, registry: str) -> str:
    """This version's image of a registry, or the image with the tag that the environment names."""
    return f"{registry.rstrip('/')}/{variant}:{environment.TAG.read() or _VERSION}"


def variant(image: str) -> str:
    """Which of the two images it is: `data` or `trainer`."""
    return image.rpartition("/")[2].partition(":")[0]
