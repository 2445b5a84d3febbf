"""Write docs/environment.md from the table in minicpmv_finetune/environment.py.

`make readmes` runs this file; `tests/docs/test_environment.py` compares the result with the committed page.
"""

from pathlib import Path

from minicpmv_finetune.environment import PREFIX, VARIABLES, Variable

PATH = Path(__file__).parent / "environment.md"
_HEAD = """# Environment variables

Every environment variable that this project reads; [`environment.py`](../minicpmv_finetune/environment.py) is the
table, and `make readmes` writes this page from it. A variable is read when its value is needed, never while a module
is imported. An empty variable counts as unset. boto3 reads `AWS_*` and huggingface_hub reads `HF_*`; these are not
listed here.
"""
_OWNERS = (
    ("Of this project", (PREFIX,)),
    ("Of MLflow", ("MLFLOW_",)),
    ("Of vLLM", ("VLLM_",)),
    ("Of Kubeflow Pipelines and Kubernetes", ("KFP_", "KF_", "KUBE")),
    ("Of torchrun, Kubeflow Trainer and the compiler", ("",)),
)


def page() -> str:
    """Return the Markdown text of the page."""
    left = list(VARIABLES)
    text = _HEAD
    for owner, prefixes in _OWNERS:
        own = [variable for variable in left if variable.name.startswith(prefixes)]
        left = [variable for variable in left if variable not in own]
        text += f"\n## {owner}\n\n| Variable | Default | Meaning |\n|---|---|---|\n"
        text += "".join(f"{_row(variable)}\n" for variable in own)
    return text


def _row(variable: Variable) -> str:
    former = f" (0.1.0: `{variable.former}`, still read)" if variable.former else ""
    default = f"`{variable.default}`" if variable.default else ""
    meaning = f"{variable.help[0].upper()}{variable.help[1:]}{former}."
    return f"| `{variable.name}` | {default} | {meaning} |"


if __name__ == "__main__":
    PATH.write_text(page())
