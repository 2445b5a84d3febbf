"""OpenMoji: what is the name of an emoji, and to which group does it belong?

Emoji that share a design, such as the twelve o'clocks, or a profession as man, woman and person, form a family, and a
family is in one split only. Most names of the test split are therefore new to the model; its group can be seen.
"""

import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from .drawing import VL_CONVERT, drawing_library
from .registries import Package
from .task import Asked, AskedImage, Split, Task, encode_png

SIDE = 112
"""Width and height of the images in pixels."""
_NAME, _GROUP = "What is the name of this emoji?", "To which group does this emoji belong?"
_DRAWN_AT = 72  # width of the SVG files
_PEOPLE = re.compile(r"\b(person|people|man|men|woman|women|boys?|girls?|child|older|adult)\b")
_VARIANT = re.compile(r":.*|\b(o’clock|thirty|left|right|up|down|with|without)\b|[\W\d]+")
_HOURS = re.compile(r"\b(one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve)\b")


def images(split: Split, packages: Mapping[str, Path]) -> Iterator[AskedImage]:
    """The emoji of Unicode in the order of OpenMoji's list, without those that differ only in the tone of the skin."""
    folder = packages["data"] / "package"
    draw = drawing_library(packages).svg_to_png
    for emoji in json.loads((folder / "data" / "openmoji.json").read_text()):
        group = emoji["group"]
        if emoji["skintone"] or group.startswith("extras") or group == "component" or split != split_of(emoji):
            continue
        svg = (folder / "color" / "svg" / f"{emoji['hexcode']}.svg").read_text()
        asked = (Asked(_GROUP, group, "group"), Asked(_NAME, emoji["annotation"], "name", "anls"))
        yield AskedImage(_on_white(draw(svg, scale=SIDE / _DRAWN_AT)), asked)


def _on_white(content: bytes) -> bytes:
    """A PNG without transparency: black outlines would disappear on the black that a model sees behind them."""
    image = Image.open(io.BytesIO(content)).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return encode_png(Image.alpha_composite(white, image).convert("RGB"))


def family_of(emoji: Mapping[str, Any]) -> str:
    """The design that an emoji shares with others; people of both genders and the hours of a clock are one family."""
    name = _PEOPLE.sub("", emoji["annotation"].lower())
    if emoji["subgroups"] == "time":
        name = _HOURS.sub("", name)
    return f"{emoji['subgroups']}/{_VARIANT.sub('', name)}"


def split_of(emoji: Mapping[str, Any]) -> Split:
    """The split of an emoji's family: a fifth of the families is held out, by the hash of its name."""
    return "test" if hashlib.sha256(family_of(emoji).encode()).digest()[0] < 51 else "train"


TASK = Task(
    name="emoji",
    title="OpenMoji, names and groups; families of a design are held out",
    packages={
        "data": Package(
            "npm",
            "openmoji",
            "CC-BY-SA-4.0",
            "17.0.0",
            ("55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68",),
        ),
        "drawing": VL_CONVERT,
    },
    images=images,
    inputs={
        "num_train_epochs": 8.0,
        "per_device_train_batch_size": 16,
        "max_slice_nums": 1,
        "evaluation_options": {"max_new_tokens": 24, "batch_size": 128},
    },
)
