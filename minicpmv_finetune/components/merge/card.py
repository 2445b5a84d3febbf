"""The model card of the merged folder."""

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

_PREDICT_COMMAND = """\
    minicpmv-finetune predict --model PATH/TO/THIS/FOLDER --image IMAGE.png --prompt "What is shown?"
"""

_TRANSFORMERS_CODE = """\
With transformers alone:

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("PATH/TO/THIS/FOLDER")
processor = AutoProcessor.from_pretrained("PATH/TO/THIS/FOLDER")
```
"""


def write_card(folder: Path, generation: Generation, report: MergeReport, record: TrainingRecord) -> None:
    """Write `README.md` with the base's license; the base's own card is kept as `README.base.md`.

    Args:
        folder: Folder of the merged model, with the base's files already in it.
        generation: Generation of the model.
        report: Report of the merge.
        record: Record of the training.
    """
    card = folder / CARD
    license_fields = {}
    if has_base_card := card.is_file():
        license_fields = _license_fields(card.read_text(errors="replace"))
        card.rename(folder / BASE_CARD)
    front = {
        **license_fields,
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
        f"A checkpoint that can be loaded in place of {html.escape(report.base_model)}.",
        *([f"The base model's card is {BASE_CARD}; its license applies to this model too."] if has_base_card else []),
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {html.escape(str(value)).replace('|', '&#124;')} |" for name, value in rows.items()),
        "",
        "## Loading",
        "",
        _PREDICT_COMMAND,
        *([_TRANSFORMERS_CODE] if generation.model_type in CONFIG_MAPPING_NAMES else []),
        "## Training arguments",
        "",
        *(f"    {line}" for line in arguments.splitlines()),
    ]
    card.write_text("\n".join(lines) + "\n")


def _license_fields(text: str) -> dict[str, str]:
    """The fields about the license in the front matter of the base's card."""
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
