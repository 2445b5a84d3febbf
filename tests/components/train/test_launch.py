import json
from pathlib import Path
from typing import Any

import pytest
import torch
from playwright.sync_api import Page
from safetensors.torch import load_file
from torch.distributed.elastic.agent.server import RunResult, WorkerState
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher import api

from minicpmv_finetune import storage
from minicpmv_finetune.components.train.launch import CrashExit, _fail, _without_useless_restarts, launch
from minicpmv_finetune.components.train.result import _base_address
from minicpmv_finetune.components.train.worker_exit import ERROR_FILE, EXIT_CODE_FILE, record_crash
from minicpmv_finetune.errors import RetryableError, SentenceExit, UserError
from minicpmv_finetune.minicpmv.adapters import load_with_adapter
from minicpmv_finetune.minicpmv.checkpoint import load_model
from minicpmv_finetune.reports.training_record import read_record
from tests.components.layout import layout_faults
from tests.warm_processes import WarmCommand

SCRIPT = "minicpmv_finetune.components.train.finetune"
LORA = (
    "--use_lora true --tune_llm false --lora_r 4 --per_device_train_batch_size 16 --learning_rate 1e-3 "
    "--save_strategy no"
)


def _flags(base: Path, shards: Path, out: Path, more: str = LORA) -> list[str]:
    paths = ["--model_name_or_path", str(base), "--data_path", str(shards), "--output_dir", str(out)]
    return [*paths, *more.split(), "--logging_steps", "1"]


@pytest.fixture(scope="module")
def adapter(tiny_46: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "adapter"
    launch(_flags(tiny_46, shards, out, f"{LORA} --num_train_epochs 2"))
    return out


def test_the_adapter_is_plain_peft_and_has_changed(tiny_46: Path, adapter: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    assert all(weight.any() for name, weight in weights.items() if "lora_B" in name)
    load_with_adapter(tiny_46, adapter)


# The fields of PEFT 0.12, which refuses others: those of PeftConfigMixin and PeftConfig, then those of LoraConfig.
FIELDS_OF_PEFT_0_12 = set(
    "peft_type auto_mapping base_model_name_or_path revision task_type inference_mode r target_modules lora_alpha "
    "lora_dropout fan_in_fan_out bias use_rslora modules_to_save init_lora_weights layers_to_transform layers_pattern "
    "rank_pattern alpha_pattern megatron_config megatron_core loftq_config use_dora layer_replication "
    "runtime_config".split()
)


def test_older_versions_of_peft_can_read_the_adapter(tiny_46: Path, adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config.keys() <= FIELDS_OF_PEFT_0_12
    assert config["base_model_name_or_path"] == str(tiny_46)
    assert config["r"] == 4


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("openbmb/MiniCPM-V-4.6", ("openbmb/MiniCPM-V-4.6", None)),
        ("hf://openbmb/MiniCPM-V-4.6@main", ("openbmb/MiniCPM-V-4.6", "main")),
        ("s3://models/base", ("s3://models/base", None)),
        ("models/base/../other", (str(Path("models/other").resolve()), None)),
    ],
)
def test_the_adapter_names_the_base_by_an_address_that_works_elsewhere(
    given: str, address: tuple[str, str | None]
) -> None:
    assert _base_address(given) == address


def test_the_record_describes_the_training(tiny_46: Path, adapter: Path) -> None:
    record = read_record(adapter)
    assert record.base_model == str(tiny_46)
    assert record.use_lora
    assert 0 < record.parameters["trainable"] < record.parameters["total"]
    assert record.arguments["lora_r"] == 4
    losses = [figures["loss"] for figures in record.history if "loss" in figures]
    assert len(losses) == 8
    assert losses[-1] < losses[0]


def test_a_training_starts_from_an_adapter_in_a_store(
    tiny_46: Path, shards: Path, adapter: Path, tmp_path: Path, s3_uri: str
) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        storage.upload_file(adapter / name, f"{s3_uri}/adapter/{name}")
    launch(_flags(tiny_46, shards, tmp_path / "more", f"{LORA} --max_steps 1 --lora_weight_path {s3_uri}/adapter"))
    record = read_record(tmp_path / "more")
    started_at = next(figures["loss"] for figures in record.history if "loss" in figures)
    fresh = next(figures["loss"] for figures in read_record(adapter).history if "loss" in figures)
    assert started_at < fresh


@pytest.mark.parametrize(("recorded", "restarts"), [(True, 0), (False, 3)])
def test_only_an_end_without_a_known_reason_is_restarted(
    recorded: bool, restarts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing:
        """torchrun's agent after a process has failed."""

        _remaining_restarts = 3

        def _monitor_workers(self, worker_group: object) -> RunResult:
            return RunResult(state=WorkerState.FAILED)

    monkeypatch.setattr(api, "LocalElasticAgent", Failing)
    if recorded:
        (tmp_path / EXIT_CODE_FILE).write_text("2")
    with _without_useless_restarts(tmp_path):
        agent: Any = api.LocalElasticAgent()  # type: ignore[call-arg]
        agent._monitor_workers(None)
    assert agent._remaining_restarts == restarts
    assert api.LocalElasticAgent is Failing


def test_a_full_fine_tune_saves_a_whole_checkpoint(
    tiny_46: Path, shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = _flags(tiny_46, shards, tmp_path / "full", "--max_steps 2 --save_strategy no --learning_rate 1e-3")
    launch([*flags, "--logging_steps", "500"])
    mean = read_record(tmp_path / "full").metrics["loss"]
    assert f"→ loss {mean:.4f}, " in capfd.readouterr().err, "no step was logged"
    tuned, _ = load_model(tmp_path / "full")
    base, _ = load_model(tiny_46)
    changed = [name for name, weight in tuned.state_dict().items() if not torch.equal(weight, base.state_dict()[name])]
    assert len(changed) > 100


def test_a_users_mistake_in_a_training_process_is_one_sentence(tiny_46: Path, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    with pytest.raises(UserError, match=r"no manifest\.json here") as error:
        launch(_flags(tiny_46, tmp_path / "shards", tmp_path / "out"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_mistake_ends_the_script_with_2_and_no_traceback(tiny_46: Path, tmp_path: Path) -> None:
    with WarmCommand(SCRIPT, _flags(tiny_46, tmp_path, tmp_path / "out")) as script:
        lines = script.stdout.read().splitlines()
        assert script.wait() == 2
    assert [line for line in lines if line.startswith("error: ")]
    assert "Traceback" not in "".join(lines)


def _failures(**codes_and_seconds: tuple[int, int]) -> ChildFailedError:
    """What torchrun raises: the exit code of each process, and the second in which torchrun noticed its end."""
    failures = {}
    for rank, (code, seconds) in enumerate(codes_and_seconds.values()):
        failures[rank] = ProcessFailure(rank, 1, code, "/nowhere")
        failures[rank].timestamp = seconds
    return ChildFailedError("train", failures)


def test_a_killed_process_is_the_cause_of_what_others_report_in_the_same_moment(tmp_path: Path) -> None:
    (tmp_path / ERROR_FILE).write_text("The connection was closed.")
    for rank, step in ((0, 8), (1, 7)):
        (tmp_path / f"progress-{rank}").write_text(f"{rank} {step} 2")
    with pytest.raises(SentenceExit) as ended:
        _fail(_failures(reports=(1, 100), is_killed=(-9, 100)), tmp_path)
    assert ended.value.code == 137
    assert ended.value.sentence.startswith("training process 1 was killed (signal 9) in step 7, as ")
    assert "--per_device_train_batch_size" in ended.value.sentence


def test_a_frozen_process_that_torchrun_kills_later_is_not_the_cause(tmp_path: Path) -> None:
    (tmp_path / ERROR_FILE).write_text("Training process 1 made no progress.")
    with pytest.raises(RetryableError, match="made no progress"):
        _fail(_failures(watchdog=(75, 100), is_frozen=(-9, 130)), tmp_path)


def test_the_sentence_of_a_crash_names_its_exception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINICPMV_FINETUNE_WORKER_EXIT_FOLDER", str(tmp_path))
    record_crash(KeyError("a bug"))
    record_crash(ValueError("what another process says of it"))
    with pytest.raises(CrashExit) as ended:
        _fail(_failures(crashed=(1, 100)), tmp_path)
    assert (ended.value.code, ended.value.sentence) == (
        1,
        "training process 0 ended with exit code 1 (KeyError: 'a bug').",
    )


def test_the_record_is_json(adapter: Path) -> None:
    assert json.loads((adapter / "training.json").read_text())["generation"] == "4.6"


def test_a_loss_that_is_not_finite_ends_training_at_once_and_names_the_samples(
    tiny_46: Path, shards: Path, tmp_path: Path
) -> None:
    flags = (
        "--max_steps 50 --per_device_train_batch_size 4 --weight_decay 1e30 --save_strategy steps --save_steps 1 "
        f"--max_grad_norm 0 --checkpoint_uri {tmp_path / 'kept'}"
    )
    with pytest.raises(UserError, match=r"at step [2-5], on the samples digit-\d+, digit-\d+.*last good checkpoint"):
        launch(_flags(tiny_46, shards, tmp_path / "out", flags))
    assert not (tmp_path / "out").exists()
    assert list((tmp_path / "kept").glob("checkpoint-*.json"))


def test_an_unchanged_adapter_is_an_error(tiny_46: Path, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="left every adapter at zero"):
        launch(_flags(tiny_46, shards, tmp_path / "out", f"{LORA} --max_steps 1 --learning_rate 1e-300"))


def test_evaluation_records_loss_and_token_accuracy_and_stops_early(
    tiny_46: Path, shards: Path, tmp_path: Path
) -> None:
    # At this rate the adapter is no longer zero, but the loss stays the same.
    flags = (
        "--use_lora true --tune_llm false --per_device_train_batch_size 16 --learning_rate 1e-12 --max_steps 40 "
        "--eval_strategy steps --eval_steps 1 --save_strategy steps --save_steps 1 --early_stopping_patience 2"
    )
    launch(_flags(tiny_46, shards, tmp_path / "out", flags))
    history = read_record(tmp_path / "out").history
    evaluated = [entry for entry in history if "eval_loss" in entry]
    assert 0 <= evaluated[0]["eval_token_accuracy"] <= 1
    assert len(evaluated) == 3


def test_the_same_settings_in_a_yaml_file_give_the_same_bits(
    tiny_46: Path, shards: Path, adapter: Path, tmp_path: Path
) -> None:
    document = {
        "model_name_or_path": str(tiny_46),
        "data_path": str(shards),
        "output_dir": str(tmp_path / "out"),
        "use_lora": True,
        "tune_llm": False,
        "lora_r": 4,
        "per_device_train_batch_size": 16,
        "learning_rate": "1e-3",
        "save_strategy": "no",
        "num_train_epochs": 2,
        "logging_steps": 1,
    }
    (tmp_path / "training.yaml").write_text(json.dumps(document))
    launch([str(tmp_path / "training.yaml")])
    first, again = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "out"))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_raw_json_is_prepared_first_also_with_torchrun(tiny_46: Path, digits: Path, tmp_path: Path) -> None:
    samples = json.loads((digits / "train.json").read_text())[:32]
    for sample in samples:
        sample["image"] = str(digits / sample["image"])
    (tmp_path / "train.json").write_text(json.dumps(samples))
    paths = ["--model_name_or_path", str(tiny_46), "--data_path", str(tmp_path / "train.json")]
    flags = [*paths, *f"{LORA} --max_steps 1 --output_dir {tmp_path / 'out'}".split()]
    torchrun = ["--standalone", "--nproc-per-node=2", "-m", "minicpmv_finetune.pipelines.finetune_script"]
    with WarmCommand("torch.distributed.run", [*torchrun, *flags]) as training:
        log = training.stdout.read()
        assert training.wait() == 0, log
    assert read_record(tmp_path / "out").history


def test_the_report_shows_the_curves_and_the_command(adapter: Path, page: Page) -> None:
    page.goto((adapter / "training.html").as_uri())
    assert page.locator("polyline").count() >= 3
    assert page.locator("polyline").first.is_visible()
    assert page.locator("pre").inner_text().startswith("minicpmv-finetune train --model_name_or_path")
    assert layout_faults(page) == []
