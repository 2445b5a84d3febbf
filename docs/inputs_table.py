"""Write docs/inputs.md from the table in minicpmv_finetune/inputs/table.py.

`make readmes` runs this file; `tests/docs/test_inputs.py` compares the result with the committed page.
"""

import json
from pathlib import Path

from minicpmv_finetune.inputs.table import FINETUNE_INPUTS, INPUTS, REQUIRED, RETRAIN_INPUTS, Input

PATH = Path(__file__).parent / "inputs.md"
_HEAD = """# Inputs of the pipelines

Every input of the pipelines `finetune` and `retrain`;
[`inputs/table.py`](../minicpmv_finetune/inputs/table.py) is the table, and `make readmes` writes this page from
it. On the command line, `minicpmv-finetune run`, `plan` and `retrain` have an option for each; a JSON object is given
as text there. A YAML file, or a [recipe](recipes.md) of the package, may contain them: `--recipe NAME_OR_FILE`.

Before the first step, a run is checked as a whole, in about two seconds: these inputs, the flags in `training_flags`
and the options of the steps with their types and ranges; the kind of the base model, by its `config.json`; and
existence, format and metrics of the data's first 1,000 samples, without decoding images. One message names all
mistakes. What a store or the hub does not answer within eight seconds is a warning. For a run on a cluster, what only
the cluster can read is left to its steps, which check again what they get.
"""


def page() -> str:
    """Return the Markdown text of the page."""
    text = _HEAD
    for group in dict.fromkeys(item.group for item in INPUTS.values()):
        text += f"\n## {group.capitalize()}\n\n| Input | Option | Type | Default | Accepted | In | Meaning |\n"
        text += "|---|---|---|---|---|---|---|\n"
        text += "".join(f"{_row(item)}\n" for item in INPUTS.values() if item.group == group)
    return text


def _row(item: Input) -> str:
    option = item.option or f"--{item.name.replace('_', '-')}"
    default = "required" if item.default is REQUIRED else f"`{json.dumps(item.default)}`"
    kind = "JSON object" if item.type is dict else item.type.__name__
    pipelines = [
        name for name, inputs in (("finetune", FINETUNE_INPUTS), ("retrain", RETRAIN_INPUTS)) if item in inputs
    ]
    cells = (f"`{item.name}`", f"`{option}`", kind, default, _accepted(item), ", ".join(pipelines), item.help)
    return f"| {' | '.join(cells)} |"


def _accepted(item: Input) -> str:
    if item.choices:
        return ", ".join(f"`{choice}`" for choice in item.choices)
    bounds = {"at least": item.at_least, "more than": item.above, "at most": item.at_most}
    return ", ".join(f"{words} {bound:,}" for words, bound in bounds.items() if bound is not None)


if __name__ == "__main__":
    PATH.write_text(page())
