"""Write training data from a CSV file with the columns image, question and answer.

    python examples/make_data.py receipts.csv train.json

Relative image paths start at the folder of the CSV file. A column `tag`, if there is one, becomes the sample's tag, by
which the evaluation's report is broken down.
"""

import csv
import json
import os
import sys
from pathlib import Path
from typing import Any


def samples(table: Path, folder: Path) -> list[dict[str, Any]]:
    """Return one sample for each line of the table.

    Args:
        table: The CSV file.
        folder: Folder of the written file, at which its relative image paths start.
    """
    found = []
    with table.open(newline="", encoding="utf-8") as lines:
        for number, row in enumerate(csv.DictReader(lines), start=1):
            image = row["image"]
            if "://" not in image:
                image = os.path.relpath(table.parent / image, folder)
            found.append(
                {
                    "id": f"{table.stem}-{number}",
                    "image": image,
                    "conversations": [
                        {"role": "user", "content": f"<image>\n{row['question']}"},
                        {"role": "assistant", "content": row["answer"]},
                    ],
                    **({"tags": [row["tag"]]} if row.get("tag") else {}),
                }
            )
    return found


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python examples/make_data.py TABLE.csv OUT.json")
    source, out = map(Path, sys.argv[1:])
    content = samples(source, out.parent)
    out.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(f"{len(content)} samples in {out}")
