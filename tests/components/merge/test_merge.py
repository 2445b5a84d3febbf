"""A merged folder replaces the base, is published only after its parity check, and states its origin."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from minicpmv_finetune.components.merge.merge import PARITY_CHECK, MergeReport, MergeSettings, markdown, merge
from minicpmv_finetune.components.merge.parity_check import check_parity
from minicpmv_finetune.components.merge.report import GeneratedAnswer
from minicpmv_finetune.errors import RetryableError, UserError
from minicpmv_finetune.minicpmv.checkpoint import fingerprint, load_model
from minicpmv_finetune.minicpmv.generations import read_slicing_config
from minicpmv_finetune.minicpmv.tiny_checkpoint import write_tiny_checkpoint
from minicpmv_finetune.outputs import MARK
from minicpmv_finetune.pipelines.demo import DEMO_CORPUS
from tests.warm_processes import running_warm_processes

Train = Callable[..., Any]
CopyBase = Callable[..., Path]


@pytest.mark.usefixtures("warm")
def test_a_merged_folder_is_a_checked_drop_in_for_its_base(
    tiny_46: Path, copy_base: CopyBase, train: Train, shards: Path, tmp_path: Path
) -> None:
    base = copy_base(tiny_46, tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: apache-2.0\ntags: [a]\n---\nThe base.\n")
    (base / "LICENSE").write_text("the licence")
    (base / "modeling_remote.py").write_text("# the original remote code")
    adapter = train(base, modules_to_save=["model.merger"]).folder
    model = tmp_path / "model"
    report = merge(str(base), adapter, shards, model, tmp_path / "report.json", MergeSettings(parity_rows=2))

    assert MergeReport.model_validate_json((tmp_path / "report.json").read_text()) == report
    assert json.loads((tmp_path / "report.json").read_text())["gate"]["parity"]["rows"] == 2
    assert report.parity_check is not None
    assert report.parity_check.failure is None
    assert 0 < report.parity_check.parity.largest_difference < 1e-4
    assert report.parity_check.parity.storage_rounding is None
    assert len(report.parity_check.generated) == report.parity_check.parity.rows == 2
    assert all(item.expected.startswith("The digit is") for item in report.parity_check.generated)
    assert report.metrics["largest_logit_difference"] == report.parity_check.parity.largest_difference

    names = {path.name for path in base.iterdir()}
    assert {path.name for path in model.iterdir()} == names | {"README.base.md", "training.json", MARK}
    for name in names - {"model.safetensors", "README.md", "processor_config.json"}:
        assert (model / name).read_bytes() == (base / name).read_bytes(), name
    assert read_slicing_config(model).max_slice_nums == 4
    AutoProcessor.from_pretrained(model)
    AutoModelForImageTextToText.from_pretrained(model)
    load_model(model)

    card = (model / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["license"] == "apache-2.0"
    assert front["base_model"] == str(base)
    assert "0123abcd" in card
    assert '"lora_r": 4' in card
    assert "3.5000, 0.2500" in card
    assert "| merger | 6 of 6 |" in markdown(report)


def test_an_adapter_that_changes_nothing_is_refused(tiny_46: Path, train: Train, shards: Path, tmp_path: Path) -> None:
    adapter = train(tiny_46).folder
    path = adapter / "adapter_model.safetensors"
    save_file({name: t * 0 if "lora_B" in name else t for name, t in load_file(path).items()}, path)
    with pytest.raises(UserError, match="the training changed nothing"):
        merge(str(tiny_46), adapter, shards, tmp_path / "model", tmp_path / "report.json", MergeSettings())
    assert not (tmp_path / "model").exists()
    assert json.loads((tmp_path / "report.json").read_text())["changed"] == {}


def test_an_adapter_for_another_generation_is_refused(
    tiny_46: Path, train: Train, write_record: Callable[..., None], shards: Path, tmp_path: Path
) -> None:
    adapter = train(tiny_46).folder
    write_record(adapter, generation="4.5")
    with pytest.raises(UserError, match=r"4\.5, but .* is 4\.6"):
        merge(str(tiny_46), adapter, shards, tmp_path / "model", tmp_path / "report.json", MergeSettings())


def test_another_base_of_the_same_shape_is_refused(
    tiny_46: Path, train: Train, write_record: Callable[..., None], shards: Path, tmp_path: Path
) -> None:
    other = write_tiny_checkpoint(tmp_path / "other", seed=1, corpus=DEMO_CORPUS)
    adapter = train(tiny_46).folder
    write_record(adapter, base_fingerprint=fingerprint(tiny_46))
    with pytest.raises(UserError, match=r"other: not the weights that .* was trained on"):
        merge(str(other), adapter, shards, tmp_path / "model", tmp_path / "merge.json", MergeSettings())
    assert not (tmp_path / "model").exists()


def test_a_merge_never_replaces_its_base(
    tiny_46: Path, copy_base: CopyBase, train: Train, shards: Path, tmp_path: Path
) -> None:
    base = copy_base(tiny_46, tmp_path / "base")
    adapter = train(base).folder
    with pytest.raises(UserError, match="is also the input --base-model"):
        merge(str(base), adapter, shards, base, tmp_path / "report.json", MergeSettings())


def test_an_adapter_folder_without_a_training_record_is_refused(tiny_46: Path, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no training\.json"):
        merge(str(tiny_46), tiny_46, shards, tmp_path / "model", tmp_path / "report.json", MergeSettings())


@pytest.mark.usefixtures("warm")
def test_a_full_fine_tune_passes_the_same_parity_check(
    tiny_46: Path,
    copy_base: CopyBase,
    write_record: Callable[..., None],
    shards: Path,
    tmp_path: Path,
) -> None:
    def move(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: t + 0.01 if name.endswith("k_proj.weight") else t for name, t in tensors.items()}

    tuned = copy_base(tiny_46, tmp_path / "tuned", move)
    write_record(tuned, use_lora=False)
    model = tmp_path / "model"
    report = merge(str(tiny_46), tuned, shards, model, tmp_path / "report.json", MergeSettings(parity_rows=1))
    assert report.kind == "full"
    assert report.parity_check is not None
    assert report.parity_check.parity.largest_difference == 0
    assert {name.split(".")[-2] for name in report.changed} == {"k_proj"}
    assert (model / "training.json").is_file()


def test_the_parity_check_refuses_a_model_that_is_not_base_and_adapter(
    tiny_46: Path, train: Train, shards: Path, tmp_path: Path
) -> None:
    adapter = train(tiny_46).folder
    found = check_parity(tiny_46, adapter, tiny_46, shards, 1)
    assert found.failure is not None
    assert "differ by" in found.failure


@pytest.mark.usefixtures("warm")
def test_a_killed_parity_check_is_a_retryable_error(tiny_46: Path, train: Train, shards: Path, tmp_path: Path) -> None:
    adapter = train(tiny_46).folder

    def kill_parity_check() -> None:
        while not (running := running_warm_processes()):
            time.sleep(0.005)
        running[0].kill()

    killer = threading.Thread(target=kill_parity_check)
    killer.start()
    with pytest.raises(RetryableError, match="ended by signal 9; it holds the model in float32"):
        merge(str(tiny_46), adapter, shards, tmp_path / "model", tmp_path / "report.json", MergeSettings())
    killer.join()
    assert not list(tmp_path.glob("*model*"))


@pytest.mark.faults_only
def test_a_terminated_merge_ends_its_parity_check_and_leaves_no_files(
    tiny_46: Path, train: Train, shards: Path, tmp_path: Path
) -> None:
    adapter = train(tiny_46).folder
    flags = ["--base-model", tiny_46, "--adapter", adapter, "--shards", shards, "--out", tmp_path / "out" / "model"]
    command = [sys.executable, "-c", "from minicpmv_finetune.cli.main import main; main()", "merge"]
    with subprocess.Popen([*command, *map(str, flags)], stderr=subprocess.PIPE) as process:
        check = _parity_check_of(psutil.Process(process.pid))
        process.terminate()
        process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert not check.is_running()
    assert [path.name for path in (tmp_path / "out").glob("[!.]*")] == ["merge-report.json"]


def _parity_check_of(merging: psutil.Process) -> psutil.Process:
    while True:
        for child in merging.children():
            with suppress(psutil.Error):
                if PARITY_CHECK in child.cmdline() and child.num_threads() > 1:  # torch is imported
                    return child
        time.sleep(0.05)


@pytest.mark.usefixtures("warm")
def test_an_error_of_the_parity_check_is_the_error_of_the_merge(
    tiny_46: Path, copy_base: CopyBase, train: Train, shards: Path, tmp_path: Path
) -> None:
    base = copy_base(tiny_46, tmp_path / "base")
    (base / "tokenizer.json").unlink()
    adapter = train(base).folder
    with pytest.raises(UserError, match="tokenizer"):
        merge(str(base), adapter, shards, tmp_path / "model", tmp_path / "report.json", MergeSettings())
    assert not list(tmp_path.glob("*model*"))
    assert not list(tmp_path.glob(".*model*"))


@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize(
    "settings",
    [
        {"modules_to_save": ["model.language_model.embed_tokens", "model.merger"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    ],
)
def test_the_parity_check_distinguishes_rounding_from_a_mistake(
    tied_46: Path,
    copy_base: CopyBase,
    train: Train,
    shards: Path,
    tmp_path: Path,
    settings: dict[str, Any],
) -> None:
    """Stored in 16 bits, a correct model differs from base and adapter by more than the tolerance."""
    base = copy_base(tied_46, tmp_path / "base", lambda tensors: {n: t.bfloat16() for n, t in tensors.items()})
    adapter = train(base, **settings).folder
    report = merge(str(base), adapter, shards, tmp_path / "model", tmp_path / "report.json", MergeSettings(1))
    assert report.parity_check is not None
    assert report.parity_check.parity.storage_rounding is not None
    assert report.parity_check.parity.largest_difference < 1e-3 < report.parity_check.parity.storage_rounding
    assert report.untied == ("ensure_weight_tying" not in settings)


def test_markdown_escapes_the_answers_of_a_model(tiny_46: Path, train: Train, shards: Path) -> None:
    check = check_parity(tiny_46, train(tiny_46).folder, tiny_46, shards, 1)
    answer = GeneratedAnswer(id="1", expected="a|b", answer="<script>x\n[y](z)")
    text = markdown(
        MergeReport(
            base_model="base",
            generation="4.6",
            data_fingerprint="0",
            kind="adapter",
            bytes=1,
            moved={},
            changed={},
            untied=False,
            memory=None,
            seconds={},
            parity_check=check.model_copy(update={"generated": [answer]}),
        )
    )
    assert r"| 1 | a\|b | &lt;script&gt;x \[y\](z) |" in text
    assert "**failed**" in text


_MEASURE_MEMORY = """
import json, sys
from pathlib import Path
from minicpmv_finetune.components.merge.streaming import stream
from minicpmv_finetune.outputs import MARK
print(stream(*map(Path, sys.argv[1:])).memory.model_dump_json())
"""


def test_the_memory_of_streaming_does_not_grow_with_the_model(
    tiny_46: Path, copy_base: CopyBase, train: Train, tmp_path: Path
) -> None:
    """A model of 400 MB, most of it embeddings that are replaced as a whole or changed by a LoRA product."""
    rows = 400 * 2**20 // (128 * 4)

    def grow(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.full((rows // 2, 128), 0.5)
        return tensors

    base = copy_base(tiny_46, tmp_path / "base", grow, vocab_size=rows // 2)
    adapter = train(base, target_modules=["lm_head", "q_proj"], modules_to_save=["embed_tokens"]).folder
    (tmp_path / "merged").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE_MEMORY, str(base), str(adapter), str(tmp_path / "merged")],
        check=True,
        capture_output=True,
        text=True,
    )
    memory = json.loads(done.stdout)
    assert memory["largest_tensor"] == rows // 2 * 128 * 4
    # Far below the bound: the memory of some blocks, not of some tensors.
    assert 0 < memory["peak"] - memory["baseline"] < memory["largest_tensor"]
    assert memory["peak"] < memory["bound"]
