"""Write docs/recipes.md from the recipes in minicpmv_finetune/inputs/recipes and what `plan` estimates for them.

`make readmes` runs this file; `tests/docs/test_recipes.py` compares the result with the committed page.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from minicpmv_finetune.inputs.recipe import read_recipe
from minicpmv_finetune.inputs.recipe_costs import SAMPLES, SLICES, TOKENS, RecipeCost, recipe_costs

PATH = Path(__file__).parent / "recipes.md"
_FOLDER = "../minicpmv_finetune/inputs/recipes"
_HEAD = """# Recipes

For everybody who asks which settings to begin with on which GPU, and what that takes. A recipe is a YAML file of
[inputs](inputs.md) for a [generation](generations.md) and a size of GPU. It has everything about the training and
nothing about your data:

```sh
minicpmv-finetune recipes                                   # list them with memory and hours
minicpmv-finetune plan --recipe 4.5-24gb --data train.json   # what your data costs with it
minicpmv-finetune run --recipe 4.5-24gb --data train.json    # on this machine
minicpmv-finetune submit --recipe 4.5-24gb -p data_uri=s3://bucket/train.json # on Kubeflow
```

Inputs that you give as options, or by `-p`, have priority. JSON objects are joined key by key:
`--training-flags '{"save_steps": 100}'` leaves the other flags of the recipe as they are. For a recipe of your own,
copy one (`minicpmv-finetune recipes 4.5-24gb > mine.yaml`), change it, and give the file: `--recipe mine.yaml`. It may
contain any input, also `data_uri`; a mistake in it is refused like one in an option. For the form in Kubeflow's UI,
`minicpmv-finetune recipes 4.5-24gb --output json` prints the values.

`retrain` and schedules take recipes too; retraining has the settings of the training as
[training flags](training.md), and a recipe's become such flags.

The recipes for eight GPUs have `nproc_per_node: 8` in `training_flags`. On Kubeflow request as many by `--gpus 8`, or
in the [profile](glossary.md#profile); with another number of GPUs give `-p 'training_flags={"nproc_per_node": 4}'`.

## Settings and memory

Take the row of your model and your card. *Needs* is the memory of each GPU for batches of the longest samples that the
recipe accepts. It leaves a fifth of the card free, which is how far such estimates were off [on a GPU](gpu.md).

"""
_COSTS = f"""
## Hours and cost

For {SAMPLES:,} samples of {TOKENS:,} tokens and {SLICES} [slices](glossary.md#slice), and as many epochs as the recipe
has, by the formulas of `plan`: from the share of a card's datasheet rate that was measured on an H200. Other cards and
several GPUs were not measured, and stored vision features make later epochs shorter. The cost is that of all GPUs of
the recipe in US$. The prices are assumed, from the middle of what clouds asked on demand in 2026; yours may be half or
twice as high. Steps without a GPU are not counted.

"""
_PRICES: Mapping[str, float] = {"L4": 0.8, "A100": 1.8, "H100": 3.0}
_AFTER = """
The dearer card is often the cheaper one, because it is faster by more than its price. For your own data
`minicpmv-finetune plan --recipe NAME --data train.json` computes all of it. Twice the samples, or twice their length,
take about twice as long.
"""


def page() -> str:
    """Return the Markdown text of the page."""
    costs = recipe_costs()
    settings = ["Recipe", "Trains", "GPUs", "Needs", "Longest sample", "Samples a step", "Rate", "Epochs"]
    prices = [f"{price:.2f} US$" for price in _PRICES.values()]
    return "".join(
        [
            _HEAD,
            _table([settings, *map(_settings, costs)]),
            _COSTS,
            _table([["Recipe", *_PRICES], ["*an hour of one GPU*", *prices], *map(_hours_and_cost, costs)]),
            _AFTER,
        ]
    )


def _table(rows: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])


def _settings(cost: RecipeCost) -> list[str]:
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
    ]


def _hours_and_cost(cost: RecipeCost) -> list[str]:
    cells = {
        card: f"{hours:.1f} h, {hours * cost.devices * _PRICES[card]:,.0f} US$" for card, hours in cost.hours.items()
    }
    return [cost.name, *(cells.get(card, "–") for card in _PRICES)]


if __name__ == "__main__":
    PATH.write_text(page())
