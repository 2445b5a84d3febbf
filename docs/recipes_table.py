"""Write docs/recipes.md from the recipes in minicpmv_finetune/inputs/recipes and what `plan` estimates for them.

`make readmes` runs this file; `tests/docs/test_recipes.py` compares the result with the committed page.
"""

from pathlib import Path

from minicpmv_finetune.inputs.recipe import read_recipe
from minicpmv_finetune.inputs.recipe_costs import CARDS, SAMPLES, SLICES, TOKENS, RecipeCost, recipe_costs

PATH = Path(__file__).parent / "recipes.md"
_FOLDER = "../minicpmv_finetune/inputs/recipes"
_HEAD = f"""# Recipes

A recipe is a YAML file of [inputs](inputs.md) for a [generation](generations.md) and a size of GPU. It has everything
about the training and nothing about your data:

```sh
minicpmv-finetune recipes                                   # list them with memory and hours
minicpmv-finetune plan --recipe 4.5-24gb --data train.json   # what your data costs with it
minicpmv-finetune run --recipe 4.5-24gb --data train.json    # on this machine
minicpmv-finetune submit --recipe 4.5-24gb -p data_uri=s3://bucket/train.json # on Kubeflow
```

Inputs that you give as options, or by `-p`, have priority. JSON objects are joined key by key:
`--training-flags '{{"save_steps": 100}}'` leaves the other flags of the recipe as they are. For a recipe of your own,
copy one (`minicpmv-finetune recipes 4.5-24gb > mine.yaml`), change it, and give the file: `--recipe mine.yaml`. It may
contain any input, also `data_uri`; a mistake in it is refused like one in an option. For the form in Kubeflow's UI,
`minicpmv-finetune recipes 4.5-24gb --output json` prints the values.

The recipes for eight GPUs have `nproc_per_node: 8` in `training_flags`. On Kubeflow request as many by `--gpus 8`, or
in the [profile](glossary.md#profile); with another number of GPUs give `-p 'training_flags={{"nproc_per_node": 4}}'`.

## What plan says of them

*Needs* is the memory of each GPU for batches of the longest samples that the recipe accepts. It leaves a fifth of the
card free, which is how far such estimates were off [on a GPU](gpu.md). *Hours* are for {SAMPLES:,} samples of
{TOKENS:,} tokens and {SLICES} [slices](glossary.md#slice), from the share of a card's datasheet rate that was measured
on an H200; other cards and several GPUs were not measured, and stored vision features make later epochs shorter. `plan`
computes both for your data.

"""


def page() -> str:
    """Return the Markdown text of the page."""
    columns = ["Recipe", "Trains", "GPUs", "Needs", "Longest sample", "Samples a step", "Rate", "Epochs"]
    columns += [f"Hours, {card}" for card in CARDS]
    lines = [columns, ["---"] * len(columns), *(_row(cost) for cost in recipe_costs())]
    return _HEAD + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _row(cost: RecipeCost) -> list[str]:
    inputs = read_recipe(cost.name)
    return [
        f"[{cost.name}]({_FOLDER}/{cost.name}.yaml)",
        f"{cost.trains}: {cost.parameters / 1e6:,.0f} M",
        f"{cost.devices} x {cost.memory_gb} GB",
        f"{cost.needed_gb:.1f} GB",
        f"{inputs['model_max_length']:,}",
        str(cost.samples_a_step),
        f"{inputs['learning_rate']:g}",
        str(inputs["num_train_epochs"]),
        *(str(cost.hours.get(card, "")) for card in CARDS),
    ]


if __name__ == "__main__":
    PATH.write_text(page())
