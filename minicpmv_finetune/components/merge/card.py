"""The merged folder's model card."""

import html
import json
from pathlib import Path

import yaml
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from minicpmv_finetune.minicpmv.generations import Generation
from minicpmv_finetune.reports.training_record import TrainingRecord

from .report import MergeReport

CARD = "README.md"
BASE_CARD = "README.base.md"

_ASKING = """\
    minicpmv-finetune predict --model PATH/TO/THIS/FOLDER --image IMAGE.png --prompt "What is shown?"
"""

_LOADING = """\
With transformers alone:

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("PATH/TO/THIS/FOLDER")
processor = AutoProcessor.from_pretrained("PATH/TO/THIS/FOLDER")
```
"""


def write_card(folder: Path, generation: Generation, report: MergeReport, record: TrainingRecord) -> None:
    """Write `README.md`; the base's own is kept beside it, and its licence is named.

    Args:
        folder: of the merged model, with the base's files already in it.
        generation: of the model.
        report: of the merge.
        record: of the training.
    """
    card = folder / CARD
    licence = {}
    if has_own := card.is_file():
        licence = _licence(card.read_text(errors="replace"))
        card.rename(folder / BASE_CARD)
    front = {
        **licence,
        "base_model": report.base_model,
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
    }
    arguments = json.dumps(record.arguments, indent=1, default=str, sort_keys=True)
    losses = [entry["loss"] for entry in record.history if "loss" in entry]
    rows = {
        "base model": report.base_model,
        "generation": f"MiniCPM-V {generation.version}",
        "training": "LoRA adapter, merged" if report.kind == "adapter" else "full fine-tune",
        "base fingerprint": report.base_fingerprint,
        "data fingerprint": report.data_fingerprint,
        "most slices of an image": record.max_slice_nums,
        "training loss, first and last logged": f"{losses[0]:.4f}, {losses[-1]:.4f}" if losses else "not logged",
    }
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(),
        "---",
        "",
        "# Fine-tuned MiniCPM-V",
        "",
        f"A checkpoint that takes the place of {html.escape(report.base_model)} wherever that loads.",
        *([f"The base model's card is {BASE_CARD}; its licence holds here too."] if has_own else []),
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {html.escape(str(value)).replace('|', '&#124;')} |" for name, value in rows.items()),
        "",
        "## Loading",
        "",
        _ASKING,
        *([_LOADING] if generation.model_type in CONFIG_MAPPING_NAMES else []),
        "## Training arguments",
        "",
        *(f"    {line}" for line in arguments.splitlines()),
    ]
    card.write_text("\n".join(lines) + "\n")


def _licence(text: str) -> dict[str, str]:
    """What the front matter of the base's card says of its licence."""
    pieces = text.split("---\n", 2)
    if len(pieces) < 3 or pieces[0].strip():
        return {}
    try:
        front = yaml.safe_load(pieces[1])
    except yaml.YAMLError:
        return {}
    if not isinstance(front, dict):
        return {}
    return {key: str(front[key]) for key in ("license", "license_name", "license_link") if front.get(key)}
