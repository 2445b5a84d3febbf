"""An interrupted training continues, and its result equals that of an uninterrupted one."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minicpmv_finetune import environment, storage
from minicpmv_finetune.components.train import finetune
from minicpmv_finetune.components.train.checkpoints import Checkpoints
from minicpmv_finetune.components.train.launch import WORKER, launch
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.outputs import MARK
from minicpmv_finetune.reports.training_record import read_record
from tests.components.train import worker_with_fsdp
from tests.warm_processes import WarmCommand

FLAGS = (
    "--use_lora true --tune_llm false --lora_r 4 --lora_dropout 0.3 --learning_rate 1e-3 --logging_steps 1 "
    "--per_device_train_batch_size 8 --num_train_epochs 2 --save_strategy steps --save_steps 3 "
    "--dataloader_num_workers 1"
)


def _flags(base: Path, shards: Path, out: Path, more: str = "") -> list[str]:
    paths = ["--model_name_or_path", str(base), "--data_path", str(shards), "--output_dir", str(out)]
    return [*paths, *FLAGS.split(), *more.split()]


@pytest.fixture(scope="module")
def undisturbed(tiny_46: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "adapter"
    launch(_flags(tiny_46, shards, out))
    return out


def _start(flags: list[str]) -> "subprocess.Popen[str]":
    code = f"from minicpmv_finetune.cli.main import main; import sys; sys.argv[1:] = ['train', *{flags!r}]; main()"
    variables = {**os.environ, environment.PROGRESS_SECONDS.name: "0"}
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=variables)


def _wait_for_step(messages: Iterable[str], step: int) -> None:
    for line in messages:
        if line.startswith("train ") and f" {step * 8}/128" in line:
            return
    raise AssertionError("the training ended before that step")


def _same(one: Path, two: Path) -> bool:
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (one, two))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# SIGTERM below interrupts the first epoch, so `make test` has a kill in the second alone.
@pytest.mark.parametrize("step", [*(pytest.param(step, marks=pytest.mark.faults_only) for step in (4, 7)), 11])
def test_a_killed_training_resumes_to_the_same_bits(
    tiny_46: Path, shards: Path, undisturbed: Path, tmp_path: Path, step: int
) -> None:
    flags = _flags(tiny_46, shards, tmp_path / "adapter")
    variables = {**os.environ, environment.PROGRESS_SECONDS.name: "0"}
    with WarmCommand(WORKER, flags, variables) as process:
        _wait_for_step(process.stdout, step)
        os.kill(process.pid, signal.SIGKILL)
    assert [path.name for path in (tmp_path / "adapter").iterdir()] == [MARK]
    launch(flags)
    assert _same(tmp_path / "adapter", undisturbed)
    logged = [
        [(entry["step"], entry["loss"]) for entry in read_record(folder).history if "loss" in entry]
        for folder in (tmp_path / "adapter", undisturbed)
    ]
    assert logged[0] == logged[1]
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize(
    "batches",
    [
        "--tokens_per_batch 400",
        "--tokens_per_batch 200 --share_images true",
        pytest.param("--packing true", marks=pytest.mark.faults_only),
    ],
)
def test_a_training_with_several_samples_in_a_row_continues_to_the_same_bits(
    tiny_46: Path, shards: Path, shared_shards: Path, tmp_path: Path, batches: str
) -> None:
    shards = shared_shards if "share" in batches else shards
    kept = tmp_path / "kept"
    more = f"--checkpoint_uri {kept} --max_steps 6 {batches}"
    for name in ("first", "again"):
        flags = _flags(tiny_46, shards, tmp_path / name, more)
        place = flags.index("--per_device_train_batch_size")
        launch(flags[:place] + flags[place + 2 :])
        for last in kept.glob("checkpoint-6*"):
            shutil.rmtree(last) if last.is_dir() else last.unlink()
    assert read_record(tmp_path / "again").continued_from == 3
    assert _same(tmp_path / "first", tmp_path / "again")


@pytest.mark.faults_only
@pytest.mark.parametrize("kind", ["--use_lora true --tune_llm false --lora_r 4 --lora_dropout 0", ""])
def test_a_training_divided_by_fsdp2_continues_to_the_same_bits(
    half_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("minicpmv_finetune.components.train.launch.WORKER", worker_with_fsdp.__name__)
    kept, file = tmp_path / "kept", "adapter_model.safetensors" if kind else "model.safetensors"
    flags = "--strategy fsdp2 --bf16 true --max_steps 4 --save_strategy steps --save_steps 2 --learning_rate 1e-4"
    for name in ("first", "again"):
        paths = ["--model_name_or_path", str(half_shards.parent / "base"), "--data_path", str(half_shards)]
        places = ["--checkpoint_uri", str(kept), "--output_dir", str(tmp_path / name)]
        launch([*paths, *places, *flags.split(), *kind.split()], 2)
        for last in kept.glob("checkpoint-4*"):
            shutil.rmtree(last) if last.is_dir() else last.unlink()
    assert read_record(tmp_path / "again").continued_from == 2
    first, again = (load_file(tmp_path / name / file) for name in ("first", "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_parent_that_is_killed_leaves_no_orphan_process(tiny_46: Path, shards: Path, tmp_path: Path) -> None:
    with _start(_flags(tiny_46, shards, tmp_path / "adapter", "--num_train_epochs 10000")) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("train ") and "loss" in line:
                break
        process.kill()
        # The training process has the other end of the pipe open, so this returns only when that process has ended.
        process.stderr.read()
    assert list(tmp_path.glob(".adapter.checkpoints/checkpoint-*.json"))


def test_sigterm_saves_and_another_run_continues_from_the_store(
    tiny_46: Path, shards: Path, undisturbed: Path, tmp_path: Path, s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = f"--checkpoint_uri {s3_uri}/minicpmv-checkpoints/{{digest}} --save_total_limit 3"
    monkeypatch.setenv(environment.PIPELINE_RUN_ID.name, "run-7")
    with _start(_flags(tiny_46, shards, tmp_path / "first" / "adapter", flags)) as process:
        assert process.stderr is not None
        _wait_for_step(process.stderr, 4)
        process.send_signal(signal.SIGTERM)
        log = process.stderr.read()
    assert process.returncode == 75
    assert "stopped by SIGTERM after step" in log
    assert "Traceback" not in log
    # Another pod, whose disk is empty, of another run of the same inputs.
    monkeypatch.setenv(environment.PIPELINE_RUN_ID.name, "run-8")
    launch(_flags(tiny_46, shards, tmp_path / "second" / "adapter", flags))
    result = tmp_path / "second" / "adapter"
    assert _same(result, undisturbed)
    # A given limit keeps as many adapters to choose from, also those that only the store still has.
    kept = sorted(result.glob("checkpoint-*"), key=lambda folder: int(folder.name.partition("-")[2]))
    assert len(kept) == 3
    assert _same(kept[-1], undisturbed)
    assert not _same(kept[0], undisturbed)
    assert read_record(kept[0]) == read_record(result)
    folders = {name.split("/")[0] for name in storage.walk(f"{s3_uri}/minicpmv-checkpoints")}
    (folder,) = folders
    names = set(storage.list_files(f"{s3_uri}/minicpmv-checkpoints/{folder}"))
    assert "finished.json" in names
    assert "lease.json" not in names


def test_a_finished_training_is_repeated_without_a_step_and_not_by_other_processes(
    tiny_46: Path, shards: Path, tmp_path: Path
) -> None:
    first, again = (
        _flags(tiny_46, shards, tmp_path / name, f"--checkpoint_uri {tmp_path / 'kept'} --max_steps 3")
        for name in ("first", "again")
    )
    launch(first)
    with pytest.raises(UserError, match="written by 1 processes, but 2 run now"):
        launch(first, 2)
    launch(again)
    assert _same(tmp_path / "again", tmp_path / "first")
    records = [read_record(tmp_path / name) for name in ("first", "again")]
    assert records[1].final_loss == records[0].final_loss
    assert records[1].metrics["loss"] == pytest.approx(records[0].metrics["loss"], rel=1e-3)
    assert ["samples/s" in record.metrics for record in records] == [True, False]


def test_another_training_starts_from_the_beginning(tiny_46: Path, shards: Path, tmp_path: Path) -> None:
    kept = f"--checkpoint_uri {tmp_path / 'kept'} --max_steps 3"
    launch(_flags(tiny_46, shards, tmp_path / "one", kept))
    launch(_flags(tiny_46, shards, tmp_path / "two", f"{kept} --lora_alpha 1"))
    steps = [entry["step"] for entry in read_record(tmp_path / "two").history if "loss" in entry]
    assert steps == [1, 2, 3]


def _write_checkpoint(folder: Path, step: int, content: bytes = b"weights") -> None:
    checkpoint = folder / f"checkpoint-{step}" / "deep"
    checkpoint.mkdir(parents=True)
    (checkpoint / "file").write_bytes(content)


def _checkpoints(folder: Path, uri: str = "", training: str = "this", world_size: int = 1) -> Checkpoints:
    return Checkpoints(folder, uri, keep=2, training=training, world_size=world_size)


def test_only_old_checkpoints_of_the_same_training_are_deleted(tmp_path: Path, s3_uri: str) -> None:
    def sealed(folder: str) -> set[str]:
        return {path for path in storage.list_files(folder) if path.endswith(".json")}

    for training, steps in (("other", (30, 60)), ("this", (10, 20, 40))):
        checkpoints = Checkpoints(tmp_path / "local", f"{s3_uri}/kept", 2, training, 1, keep_local=2)
        for step in steps:
            _write_checkpoint(tmp_path / "local", step)
            checkpoints.seal(step, best=str(tmp_path / "local" / "checkpoint-10"))
        checkpoints.finish_upload()
    expected = {f"checkpoint-{step}.json" for step in (20, 30, 40, 60)}
    assert sealed(f"{s3_uri}/kept") == expected
    assert sealed(str(tmp_path / "local")) == expected | {"checkpoint-10.json"}, "the training may return to this one"
    assert (tmp_path / "local" / "checkpoint-30" / "deep" / "file").is_file()
    # A training that began again from an earlier checkpoint keeps what it writes.
    _write_checkpoint(tmp_path / "local", 15)
    checkpoints.seal(15)
    assert checkpoints.named(str(tmp_path / "local" / "checkpoint-15"))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("none", ""),
        ("training", "belongs to a training with another base model, other data or other flags; give"),
        ("processes", "written by 1 processes, but 2 run now"),
        ("newer", "schema version 2 is newer"),
        ("truncated", "a file is missing or differs from checkpoint-4.json, so the checkpoint is damaged"),
        ("missing file", "a file is missing or differs"),
        ("no seal", "not a complete checkpoint of a training, because checkpoint-4.json is not beside it"),
        ("adapter", "not a complete checkpoint of a training.*--lora_weight_path"),
        ("no folder", "there is no such local folder"),
    ],
)
def test_a_named_checkpoint_is_checked_like_one_that_is_found(tmp_path: Path, change: str, sentence: str) -> None:
    _write_checkpoint(tmp_path, 4)
    _checkpoints(tmp_path).seal(4)
    place, seal = tmp_path / "checkpoint-4", tmp_path / "checkpoint-4.json"
    checkpoints = _checkpoints(tmp_path / "elsewhere", training="that" if change == "training" else "this")
    checkpoints.world_size = 2 if change == "processes" else 1
    if change == "newer":
        seal.write_text(seal.read_text().replace('"schema_version": 1', '"schema_version": 2'))
    elif change == "truncated":
        (place / "deep" / "file").write_bytes(b"wei")
    elif change == "missing file":
        (place / "deep" / "file").unlink()
    elif change == "no seal":
        seal.unlink()
    elif change == "adapter":
        place = place.rename(tmp_path / "adapter")
    elif change == "no folder":
        place = tmp_path / "nowhere"
    if not sentence:
        assert checkpoints.named(f"{place}/") == place
        return
    with pytest.raises(UserError, match=sentence) as error:
        checkpoints.named(str(place))
    assert str(error.value).startswith(f"--resume_from_checkpoint {place}: ")


def test_the_end_of_a_training_deletes_its_own_checkpoints_alone(tmp_path: Path) -> None:
    folder = tmp_path / ".adapter.checkpoints"
    for training, step in (("this", 10), ("that", 20)):
        _write_checkpoint(folder, step)
        _checkpoints(folder, training=training).seal(step)
    _write_checkpoint(folder, 30)  # incomplete
    (folder / ".checkpoint-30.json.123").write_text("{")
    (folder / MARK).write_text("{}")
    for name in ("notes.txt", "checkpoint-best.json"):
        (folder / name).write_text("mine")
    assert _checkpoints(folder).places_of_others() == [str(folder)]
    _checkpoints(folder).delete_local()
    left = {path.name for path in folder.iterdir()}
    assert left == {MARK, "notes.txt", "checkpoint-best.json", "checkpoint-20", "checkpoint-20.json"}
    for name in ("notes.txt", "checkpoint-best.json"):
        (folder / name).unlink()
    _checkpoints(folder, training="that").delete_local()
    assert not folder.exists()


def test_checkpoints_of_another_training_in_a_store_are_noticed(tmp_path: Path, s3_uri: str) -> None:
    for training in ("that", "this"):
        checkpoints = _checkpoints(tmp_path / training, f"{s3_uri}/kept", training)
        assert checkpoints.places_of_others() == ([f"{s3_uri}/kept"] if training == "this" else [])
        _write_checkpoint(tmp_path / training, 1)
        checkpoints.seal(1)
        checkpoints.finish_upload()


def test_training_goes_on_while_a_checkpoint_is_sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_read, file_sha256 = threading.Event(), storage.file_sha256

    def slow_sha256(path: Path) -> str:
        assert may_read.wait(30)
        return file_sha256(path)

    monkeypatch.setattr(storage, "file_sha256", slow_sha256)
    checkpoints, seal = _checkpoints(tmp_path), tmp_path / "checkpoint-4.json"
    _write_checkpoint(tmp_path, 4)

    def train_to_an_error() -> None:
        with checkpoints.written_by_this_run():
            checkpoints.begin_sealing(4, {}, None)
            assert not seal.exists()
            may_read.set()
            raise UserError("The loss is not finite.")

    with pytest.raises(UserError, match="not finite"):
        train_to_an_error()
    assert seal.exists(), "the last checkpoint counts also after an error"
    _write_checkpoint(tmp_path, 8)
    checkpoints.begin_sealing(8, {}, None)
    checkpoints.finish_upload()
    assert checkpoints.newest() == tmp_path / "checkpoint-8"


def test_others_may_write_only_when_the_last_upload_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    lease: Any = SimpleNamespace(release=lambda is_finished: done.append("lease"))
    checkpoints = Checkpoints(tmp_path, "s3://bucket/kept", 2, "this", 1, lease=lease)

    def upload(seal: object, files: object) -> None:
        time.sleep(0.05)
        done.append("upload")

    def train_to_an_error() -> None:
        with checkpoints.written_by_this_run():
            checkpoints.begin_sealing(4, {}, None)
            raise UserError("The loss is not finite.")

    monkeypatch.setattr(checkpoints, "_upload_checkpoint", upload)
    _write_checkpoint(tmp_path, 4)
    with pytest.raises(UserError, match="not finite"):
        train_to_an_error()
    assert done == ["upload", "lease"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, (2, 2)),
        ({"save_total_limit": 10}, (10, 10)),
        ({"save_total_limit": 10, "use_lora": False}, (10, 2)),
        ({"save_total_limit": 1}, (1, 1)),
        ({"save_total_limit": 10, "checkpoint_uri": "s3://bucket/kept"}, (10, 2)),
        ({"checkpoint_uri": "kept"}, (2, None)),
    ],
)
def test_as_many_checkpoints_stay_as_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any], expected: tuple[int, int | None]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(finetune, "training_digest", lambda *arguments: "this")
    plain = {"save_total_limit": None, "checkpoint_uri": "", "process_index": 1, "world_size": 2, "use_lora": True}
    settings = {**plain, **flags}
    arguments: Any = SimpleNamespace(training=SimpleNamespace(**settings))
    inputs: Any = SimpleNamespace(manifest=SimpleNamespace(data_fingerprint="data"), base_fingerprint="base")
    checkpoints = finetune._open_checkpoints(arguments, inputs, tmp_path / "out")
    assert (checkpoints.keep, checkpoints.keep_local) == expected


def test_unsealed_and_damaged_checkpoints_do_not_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = _checkpoints(tmp_path)
    for step in (5, 10, 15):
        _write_checkpoint(tmp_path, step)
    checkpoints.seal(5)
    checkpoints.seal(10)
    assert checkpoints.newest() == tmp_path / "checkpoint-10"
    (tmp_path / "checkpoint-10" / "deep" / "file").write_bytes(b"weightz")
    assert checkpoints.newest() == tmp_path / "checkpoint-5"
    assert "checkpoint-10 is damaged" in capsys.readouterr().err


def test_the_store_keeps_the_newest_and_replaces_a_damaged_local_copy(tmp_path: Path, s3_uri: str) -> None:
    checkpoints = _checkpoints(tmp_path / "local", f"{s3_uri}/kept")
    for step in (1, 2, 3):
        _write_checkpoint(tmp_path / "local", step, b"%d" % step)
        checkpoints.seal(step)
    checkpoints.finish_upload()
    (tmp_path / "local" / "checkpoint-3" / "deep" / "file").write_bytes(b"x")
    assert (_checkpoints(tmp_path / "local", f"{s3_uri}/kept").newest() or tmp_path).name == "checkpoint-3"
    assert (tmp_path / "local" / "checkpoint-3" / "deep" / "file").read_bytes() == b"3"
    other_pod = _checkpoints(tmp_path / "other", f"{s3_uri}/kept")
    assert other_pod.newest() == tmp_path / "other" / "checkpoint-3"
    assert other_pod._steps(f"{s3_uri}/kept") == {2, 3}


@pytest.mark.parametrize("damage", ["other bytes", "a file is missing"])
def test_if_a_checkpoint_in_the_store_is_damaged_the_one_before_is_used(
    tmp_path: Path, s3_uri: str, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    checkpoints = _checkpoints(tmp_path / "local", f"{s3_uri}/kept")
    for step in (1, 2):
        _write_checkpoint(tmp_path / "local", step, b"%d" % step)
        checkpoints.seal(step)
    checkpoints.finish_upload()
    file = f"{s3_uri}/kept/checkpoint-2/deep/file"
    if damage == "other bytes":
        storage.write_bytes(file, b"3")
    else:
        storage.remove_file(file)
    found = _checkpoints(tmp_path / "other", f"{s3_uri}/kept").newest()
    assert found == tmp_path / "other" / "checkpoint-1"
    assert (found / "deep" / "file").read_bytes() == b"1"
    assert "checkpoint-2 is damaged; the checkpoint before it is used" in capsys.readouterr().err
    assert not (tmp_path / "other" / "checkpoint-2").exists()
    assert not (tmp_path / "other" / "checkpoint-2.json").exists()


def test_a_checkpoint_of_two_nodes_is_complete_in_the_store(tmp_path: Path, s3_uri: str) -> None:
    first, second = (_checkpoints(tmp_path / name, f"{s3_uri}/kept", world_size=2) for name in ("first", "second"))
    _write_checkpoint(tmp_path / "first", 1)
    (tmp_path / "second" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "second" / "checkpoint-1" / "rng_state_1.pth").write_bytes(b"state")
    parts = second.upload_part(1)
    assert parts.keys() == {"rng_state_1.pth"}
    assert not (tmp_path / "second" / "checkpoint-1").exists(), "it is deleted from the node's disk"
    first.seal(1, parts)
    first.finish_upload()
    found = _checkpoints(tmp_path / "again", f"{s3_uri}/kept", world_size=2).newest()
    assert found is not None
    assert (found / "rng_state_1.pth").read_bytes() == b"state"
    assert (found / "deep" / "file").read_bytes() == b"weights"


def test_nodes_that_share_a_folder_upload_no_parts(tmp_path: Path) -> None:
    _write_checkpoint(tmp_path, 1)
    assert _checkpoints(tmp_path).upload_part(1) == {}
    assert (tmp_path / "checkpoint-1" / "deep" / "file").exists()


def test_a_checkpoint_of_a_newer_program_is_refused(tmp_path: Path) -> None:
    checkpoints = _checkpoints(tmp_path)
    _write_checkpoint(tmp_path, 1)
    checkpoints.seal(1)
    seal = tmp_path / "checkpoint-1.json"
    seal.write_text(seal.read_text().replace('"schema_version": 1', '"schema_version": 2'))
    with pytest.raises(UserError, match="schema version 2 is newer than this program's 1; upgrade"):
        checkpoints.newest()
