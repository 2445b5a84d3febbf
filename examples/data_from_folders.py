"""Write training data from images that are sorted into a folder for each class.

    python examples/data_from_folders.py flowers train.json "Which flower is this?"

The folder's name is the answer, with spaces in place of underscores. Images below a class may be sorted further.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def samples(folder: Path, question: str, out: Path) -> list[dict[str, Any]]:
    """Return one sample for each image.

    Args:
        folder: Folder with a folder for each class.
        question: Question that is asked about every image.
        out: Folder of the written file, at which its relative image paths start.
    """
    found = []
    for image in sorted(folder.rglob("*")):
        inside = image.relative_to(folder)
        if image.suffix.lower() in ENDINGS and len(inside.parts) > 1:
            found.append(
                {
                    "id": inside.as_posix(),
                    "image": os.path.relpath(image, out),
                    "conversations": [
                        {"role": "user", "content": f"<image>\n{question}"},
                        {"role": "assistant", "content": inside.parts[0].replace("_", " ")},
                    ],
                }
            )
    return found


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: python examples/data_from_folders.py FOLDER OUT.json QUESTION")
    source, target = map(Path, sys.argv[1:3])
    content = samples(source, sys.argv[3], target.parent)
    if not content:
        sys.exit(f"{source}: no image below a folder for its class; sort the images into such folders.")
    target.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    classes = len({sample["conversations"][1]["content"] for sample in content})
    print(f"{len(content)} samples of {classes} classes in {target}")
