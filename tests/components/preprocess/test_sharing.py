"""Shards are written by several processes and pods, resumed after a kill, and reused by later runs."""

import dataclasses
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient
from PIL import Image

from minicpmv_finetune import storage
from minicpmv_finetune.components.preprocess import shard_tasks
from minicpmv_finetune.components.preprocess.preprocess import (
    PreprocessSettings,
    check_parts,
    default_cache,
    preprocess,
    preprocess_partition,
)
from minicpmv_finetune.components.preprocess.report import PREVIEWS_FILE
from minicpmv_finetune.components.validate_data.validate import ValidationSettings, validate_data
from minicpmv_finetune.data.samples import Split
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.outputs import MARK
from minicpmv_finetune.shards.cache import open_shards
from minicpmv_finetune.shards.format import Manifest, ShardReader, read_manifest

ROWS_PER_SHARD = 40
SETTINGS = PreprocessSettings()


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_tasks, "SHARD_ROWS", ROWS_PER_SHARD)


@dataclasses.dataclass
class Dataset:
    """A validated dataset of a few shards."""

    folder: Path
    base_model: Path
    data: Path

    @property
    def path(self) -> Path:
        return self.folder / "dataset"

    def validate(self) -> None:
        files = str(self.data / "train.json"), str(self.data / "eval.json")
        validate_data(*files, self.path, self.folder / "rejects.jsonl", ValidationSettings())

    def run(self, name: str, settings: PreprocessSettings = SETTINGS, cache: str = "", num_workers: int = 1) -> Path:
        shards = self.folder / name
        rejects = self.folder / f"{name}.jsonl"
        preprocess(self.path, str(self.base_model), shards, rejects, settings, cache, num_workers)
        return shards

    def part(self, cache: str, part: int, parts: int) -> str:
        return preprocess_partition(self.path, str(self.base_model), SETTINGS, cache, part, parts, num_workers=1)


@pytest.fixture
def dataset(tmp_path: Path, tiny_46: Path, digits: Path) -> Dataset:
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    for split, count in (("train", 100), ("eval", 30)):
        samples = json.loads((digits / f"{split}.json").read_text())[:count]
        # One sample is too long; it is rejected with the same reason in every run.
        samples[7]["conversations"][0]["content"] += " word" * 2000
        (data / f"{split}.json").write_text(json.dumps(samples))
        for sample in samples:
            shutil.copyfile(digits / sample["image"], data / sample["image"])
    made = Dataset(tmp_path, shutil.copytree(tiny_46, tmp_path / "base"), data)
    made.validate()
    return made


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MARK}


def inodes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in folder.glob("*.parquet")}


def cached(cache: Path) -> Path:
    (folder,) = cache.iterdir()
    return folder


def test_more_processes_give_the_same_bytes(dataset: Dataset) -> None:
    one = dataset.run("one", cache=str(dataset.folder / "a"), num_workers=1)
    three = dataset.run("three", cache=str(dataset.folder / "b"), num_workers=3)
    assert content(one) == content(three)
    assert content(cached(dataset.folder / "a")) == content(cached(dataset.folder / "b"))
    assert (dataset.folder / "one.jsonl").read_text() == (dataset.folder / "three.jsonl").read_text() != ""
    names = [shard.file for shard in read_manifest(one).files]
    assert names == ["train-00000.parquet", "train-00001.parquet", "train-00002.parquet", "eval-00000.parquet"]


def test_parts_give_the_same_bytes_as_one(dataset: Dataset) -> None:
    one = dataset.run("one", cache=str(dataset.folder / "a"))
    shared = str(dataset.folder / "b")
    keys = [dataset.part(shared, part, 3) for part in (2, 0, 1)]
    written = inodes(cached(dataset.folder / "b"))
    assert set(written) == {shard.file for shard in read_manifest(one).files}, "the parts write all shards"
    together = dataset.run("together", cache=shared)
    assert content(together) == content(one)
    assert inodes(together) == written, "the shards are neither written again nor copied"
    check_parts(read_manifest(together), keys)
    with pytest.raises(UserError, match="prepared under the key other"):
        check_parts(read_manifest(together), [*keys, "other"])


def test_a_part_reads_only_the_images_of_its_shards(dataset: Dataset) -> None:
    samples = json.loads((dataset.data / "train.json").read_text())
    for sample in samples[ROWS_PER_SHARD : 2 * ROWS_PER_SHARD]:
        (dataset.data / sample["image"]).unlink()
    cache = dataset.folder / "a"
    dataset.part(str(cache), 0, 2)
    assert {path.name for path in cached(cache).glob("*.parquet")} == {"train-00000.parquet", "train-00002.parquet"}
    with pytest.raises(UserError, match="png: not found"):
        dataset.part(str(cache), 1, 2)


def test_a_part_may_be_empty(dataset: Dataset) -> None:
    keys = {dataset.part(str(dataset.folder / "a"), part, 9) for part in range(9)}
    assert len(keys) == 1


def test_a_second_run_reuses_the_shards_of_the_first(dataset: Dataset) -> None:
    first = dataset.run("first")
    shutil.rmtree(dataset.data / "images")  # no image is read again
    second = dataset.run("second")
    assert content(second) == content(first)
    assert inodes(second) == inodes(first)
    assert (dataset.folder / "second.jsonl").read_text() == (dataset.folder / "first.jsonl").read_text()


def test_shards_of_the_same_data_at_another_address_are_reused(dataset: Dataset) -> None:
    first = dataset.run("first")
    dataset.data = dataset.data.rename(dataset.folder / "elsewhere")
    dataset.validate()
    assert inodes(dataset.run("second")) == inodes(first)
    assert str(dataset.data / "train.json") in (dataset.folder / "second.jsonl").read_text(), (
        "rejects have the new address"
    )


def changed_image(dataset: Dataset) -> None:
    image = next((dataset.data / "images").iterdir())
    Image.open(image).rotate(180).save(image)
    dataset.validate()


def changed_order(dataset: Dataset) -> None:
    samples = json.loads((dataset.data / "train.json").read_text())
    (dataset.data / "train.json").write_text(json.dumps(samples[::-1]))
    dataset.validate()


def changed_template(dataset: Dataset) -> None:
    for path in dataset.base_model.glob("*chat_template*"):
        path.write_text(path.read_text().replace("<|im_end|>", "\\n<|im_end|>"))


def changed_slicing(dataset: Dataset) -> None:
    for path in dataset.base_model.glob("*processor_config.json"):
        path.write_text(re.sub(r'"scale_resolution": \d+', '"scale_resolution": 224', path.read_text()))


@pytest.mark.parametrize("change", [changed_image, changed_order, changed_template, changed_slicing])
def test_everything_that_determines_the_shards_is_part_of_their_key(
    change: Callable[[Dataset], None], dataset: Dataset
) -> None:
    first = read_manifest(dataset.run("first"))
    change(dataset)
    second = read_manifest(dataset.run("second"))
    assert second.key != first.key
    assert second.shards != first.shards


@pytest.mark.parametrize(
    "settings",
    [
        PreprocessSettings(max_slice_nums=1),
        PreprocessSettings(model_max_length=1000),
        PreprocessSettings(codec="png"),
    ],
)
def test_settings_are_part_of_the_key(settings: PreprocessSettings, dataset: Dataset) -> None:
    assert read_manifest(dataset.run("first")).key != read_manifest(dataset.run("second", settings)).key


def test_versions_of_the_encoding_and_of_libraries_are_part_of_the_key(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [read_manifest(dataset.run("first")).key]
    monkeypatch.setattr(shard_tasks, "ENCODING_VERSION", shard_tasks.ENCODING_VERSION + 1)
    keys.append(read_manifest(dataset.run("second")).key)
    monkeypatch.setattr(shard_tasks, "version", lambda library: f"later version of {library}")
    keys.append(read_manifest(dataset.run("third")).key)
    assert len(set(keys)) == 3


def test_a_shard_that_was_damaged_in_the_cache_is_written_again(dataset: Dataset) -> None:
    first = content(dataset.run("first"))
    folder = cached(dataset.folder / "shards-cache")
    damaged = bytearray(first["train-00001.parquet"])
    damaged[100] ^= 1
    (folder / "train-00001.parquet").unlink()
    (folder / "train-00001.parquet").write_bytes(damaged)
    (folder / "eval-00000.parquet").unlink()
    assert content(dataset.run("second")) == first


@pytest.mark.parametrize(
    ("moment", "kept"),
    [
        ("train-00000.json", set()),
        ("train-00001.json", {"train-00000.parquet"}),
        ("cache/[^/]*/manifest.json", {f"train-0000{number}.parquet" for number in range(3)} | {"eval-00000.parquet"}),
    ],
)
def test_preprocess_resumes_after_a_kill_at_any_moment(
    moment: str, kept: set[str], dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process is killed just before it writes a file."""
    expected = content(dataset.run("expected", cache=str(dataset.folder / "other")))
    cache, write = str(dataset.folder / "cache"), storage.write_bytes

    def kill_or_write(uri: str, content: bytes) -> None:
        if re.search(moment, uri):
            os.kill(os.getpid(), signal.SIGKILL)
        write(uri, content)

    def prepare() -> None:
        monkeypatch.setattr(storage, "write_bytes", kill_or_write)
        dataset.run("shards", cache=cache)

    process = multiprocessing.get_context("fork").Process(target=prepare)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    folder = cached(dataset.folder / "cache")
    assert not (folder / "manifest.json").exists()
    finished = {path.with_suffix(".parquet").name for path in folder.glob("*.json")}
    assert kept <= finished
    before = inodes(folder)
    again = dataset.run("shards", cache=cache)
    assert content(again) == expected
    assert {name: before[name] for name in kept}.items() <= inodes(again).items(), "finished shards are kept"


def test_finished_shards_are_stored_in_object_storage_and_reused(s3_uri: str, dataset: Dataset, tmp_path: Path) -> None:
    local = dataset.run("local")
    cache = f"{s3_uri}/shards-cache"
    remote = dataset.run("remote", cache=cache)
    manifest = read_manifest(remote)
    assert [path.name for path in remote.glob("[!.]*")] == ["manifest.json"], "no shard is uploaded twice"
    assert manifest.location == f"{cache}/{manifest.key}"
    assert manifest.model_copy(update={"location": ""}) == read_manifest(local)
    copy = open_shards(str(remote), tmp_path / "copies")
    assert {name: data for name, data in content(copy).items() if name.endswith(".parquet")} == {
        name: data for name, data in content(local).items() if name.endswith(".parquet")
    }
    assert open_shards(manifest.location, tmp_path / "copies") == copy, "the cache is a shards folder too"
    assert len(ShardReader(remote, "train")) == manifest.rows("train")
    shutil.rmtree(dataset.data / "images")
    assert content(dataset.run("again", cache=cache)) == content(remote)


def test_a_shard_missing_in_the_store_is_written_again(s3_uri: str, s3_client: object, dataset: Dataset) -> None:
    manifest = read_manifest(dataset.run("first", cache=f"{s3_uri}/cache"))
    storage.write_bytes(f"{manifest.location}/train-00001.parquet", b"cut off")
    dataset.run("second", cache=f"{s3_uri}/cache")
    shard = manifest.shards["train"][1]
    assert storage.list_files(manifest.location)[shard.file] == shard.bytes


def test_the_cache_is_beside_the_folder_of_the_run(s3_uri: str, tmp_path: Path) -> None:
    for pipeline in ("minicpmv-finetune", "minicpmv-retrain"):  # both have the same cache
        uri = f"{s3_uri}/root/{pipeline}/run/task/execution/dataset"
        assert default_cache(uri) == f"{s3_uri}/root/minicpmv-shards"
    assert default_cache(f"{s3_uri}/dataset") == f"{s3_uri}/minicpmv-shards"
    assert default_cache(str(tmp_path / "artifacts/run/task/dataset")) == str(tmp_path / "shards-cache")


def test_without_access_to_the_store_there_is_no_cache(
    s3_uri: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "mistyped-secret")
    uri = f"{s3_uri}/root/pipeline/run/task/execution/dataset"
    assert default_cache(uri) == ""
    assert "Shards are not kept for later runs" in capsys.readouterr().err
    with pytest.raises(UserError, match="access denied"):
        default_cache(uri, is_needed=True)


def test_a_cache_that_cannot_be_written_is_explained(dataset: Dataset) -> None:
    (dataset.folder / "file").touch()
    with pytest.raises(UserError, match="file"):
        dataset.run("shards", cache=str(dataset.folder / "file"))


def test_rows_are_in_the_order_of_the_data(dataset: Dataset) -> None:
    manifest: Manifest = read_manifest(dataset.run("shards", num_workers=2))
    splits: tuple[Split, ...] = ("train", "eval")
    for split in splits:
        ids = [sample["id"] for sample in json.loads((dataset.data / f"{split}.json").read_text())]
        del ids[7]
        assert [row.id for row in ShardReader(dataset.folder / "shards", split)] == ids
        assert manifest.rows(split) == len(ids)


@pytest.mark.parametrize("generation", ["2.6", "4.6"])
def test_torch_is_not_imported_and_transformers_only_by_a_step_that_writes(
    generation: str, dataset: Dataset, tiny: Callable[[str], Path], empty_database: Path
) -> None:
    """Nor is pandas, which MLflow and pyarrow would import."""
    tracking = shutil.copy(empty_database, dataset.folder / "mlflow.db")
    shutil.rmtree(dataset.base_model)
    shutil.copytree(tiny(generation), dataset.base_model)
    code = (
        "import sys; from pathlib import Path; from minicpmv_finetune.components.preprocess import preprocess as step; "
        "folder, base, name = sys.argv[1:]; folder = Path(folder); "
        "step.preprocess(folder / 'dataset', base, folder / name, folder / f'{name}.jsonl', step.PreprocessSettings(), "
        "num_workers=1, report=folder / f'{name}.html'); "
        "large = {'mlflow', 'pandas', 'torch', 'transformers'} & set(sys.modules); "
        "(folder / f'{name}.imported').write_text(' '.join(sorted(large)))"
    )
    for name, uri in (("first", ""), ("second", f"sqlite:///{tracking}")):
        command = [sys.executable, "-c", code, str(dataset.folder), str(dataset.base_model), name]
        subprocess.run(command, env={**os.environ, "MLFLOW_TRACKING_URI": uri}, check=True)
    assert (dataset.folder / "first.imported").read_text() == "transformers"
    assert (dataset.folder / "second.imported").read_text() == "mlflow"
    client = MlflowClient(f"sqlite:///{tracking}")
    (run,) = client.search_runs([found.experiment_id for found in client.search_experiments()])
    assert (run.info.run_name, run.info.status, run.data.metrics["samples/train"]) == ("preprocess", "FINISHED", 99)
    assert [item.path for item in client.list_artifacts(run.info.run_id)] == ["shards.html"]
    assert content(dataset.folder / "second") == content(dataset.folder / "first")
    assert (dataset.folder / "second.html").read_text() == (dataset.folder / "first.html").read_text()


def test_what_an_earlier_version_left_out_of_the_cache_is_made_again(dataset: Dataset) -> None:
    def page(name: str) -> str:
        report = dataset.folder / f"{name}.html"
        rejects = dataset.folder / f"{name}.jsonl"
        preprocess(
            dataset.path, str(dataset.base_model), dataset.folder / name, rejects, SETTINGS, cache, 1, report=report
        )
        return report.read_text()

    cache = str(dataset.folder / "cache")
    first = page("first")
    for name in ("manifest.json", PREVIEWS_FILE):
        (cached(Path(cache)) / name).unlink()
    assert page("second") == first
    (cached(Path(cache)) / PREVIEWS_FILE).write_text("[{}]")
    assert page("third") == first
    assert content(dataset.folder / "third") == content(dataset.folder / "first")
