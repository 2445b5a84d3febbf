"""Write training data from a COCO file: captions, or objects with their boxes.

    python examples/data_from_coco.py captions_train.json images train.json
    python examples/data_from_coco.py instances_train.json images train.json

Each caption becomes a sample, and evaluation accepts every caption of its image. Of objects, each image becomes a
sample whose answer is JSON: the objects from left to right, with left, top, right and bottom of their boxes in
thousandths of the image's width and height. Change `QUESTIONS` and `boxes` if your model shall answer in another way.
"""

import json
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

QUESTIONS = {
    "captions": "Describe this image in one sentence.",
    "objects": 'Which objects are there? Answer as JSON: [{"label": "name", "box": [left, top, right, bottom]}]',
}


def samples(content: dict[str, Any], folder: Path, out: Path) -> list[dict[str, Any]]:
    """Return the samples of a COCO file.

    Args:
        content: The file's content.
        folder: Folder of the images.
        out: Folder of the written file, at which its relative image paths start.
    """
    names = {category["id"]: category["name"] for category in content.get("categories", [])}
    by_image: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for annotation in content["annotations"]:
        by_image[annotation["image_id"]].append(annotation)
    found = []
    for image in content["images"]:
        annotations = by_image[image["id"]]
        path = os.path.relpath(folder / image["file_name"], out)
        captions = [annotation["caption"].strip() for annotation in annotations if "caption" in annotation]
        for number, caption in enumerate(captions, start=1):
            sample = _sample(f"{image['id']}-{number}", path, QUESTIONS["captions"], caption, "rouge_l")
            found.append({**sample, "answers": captions})
        if annotations and not captions:
            answer = json.dumps(boxes(annotations, names, image), ensure_ascii=False)
            found.append(_sample(str(image["id"]), path, QUESTIONS["objects"], answer, "json_fields"))
    return found


def boxes(annotations: list[dict[str, Any]], names: dict[int, str], image: dict[str, Any]) -> list[dict[str, Any]]:
    """Return an image's objects with their boxes in thousandths, from left to right; crowds are left out."""
    found = []
    for annotation in annotations:
        if annotation.get("iscrowd"):
            continue
        left, top, width, height = annotation["bbox"]
        across, down = 1000 / image["width"], 1000 / image["height"]
        edges = [left * across, top * down, (left + width) * across, (top + height) * down]
        found.append({"label": names[annotation["category_id"]], "box": [round(edge) for edge in edges]})
    return sorted(found, key=lambda item: item["box"])


def _sample(name: str, image: str, question: str, answer: str, metric: str) -> dict[str, Any]:
    return {
        "id": name,
        "image": image,
        "conversations": [
            {"role": "user", "content": f"<image>\n{question}"},
            {"role": "assistant", "content": answer},
        ],
        "metric": metric,
    }


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: python examples/data_from_coco.py COCO.json IMAGES OUT.json")
    source, pictures, target = map(Path, sys.argv[1:])
    converted = samples(json.loads(source.read_text(encoding="utf-8")), pictures, target.parent)
    target.write_text(json.dumps(converted, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(f"{len(converted)} samples in {target}")
