"""Files of every published version stay readable; files of a newer version are refused with a sentence.

`published/VERSION` contains files that this version wrote. A new version adds a folder and changes no other.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from minicpmv_finetune.components.train.checkpoints import Checkpoints
from minicpmv_finetune.data.samples import DATASET_FILE, read_info, read_samples
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.kubeflow.profile import load_profile
from minicpmv_finetune.reports.training_record import RECORD_FILE, read_record
from minicpmv_finetune.shards.format import MANIFEST_FILE, ShardReader, read_manifest, verify_shards

VERSIONS = sorted((Path(__file__).parent / "published").iterdir())


@pytest.fixture(params=VERSIONS, ids=lambda folder: folder.name)
def published(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(request.param, tmp_path / "published"))


def _checkpoints(folder: Path) -> Checkpoints:
    return Checkpoints(folder / "checkpoints", "", keep=2, training="a1b2", world_size=2)


def test_files_of_a_published_version_are_readable(published: Path) -> None:
    assert read_info(published / "dataset").rows == {"train": 3, "eval": 2}
    assert [sample.turns[-1].role for sample in read_samples(published / "dataset", "train")] == ["assistant"] * 3
    manifest = read_manifest(published / "shards")
    verify_shards(published / "shards", manifest)
    row = ShardReader(published / "shards", "train")[2]
    assert row.slices[0].shape == (112, 112, 3)
    assert len(row.input_ids) == len(row.labels) == manifest.lengths["train"][2]
    assert read_record(published / "adapter").metrics == {"loss": 0.5}
    assert _checkpoints(published).newest() == published / "checkpoints" / "checkpoint-3"
    assert load_profile(published / "profile.yaml").namespace


@pytest.mark.parametrize(
    ("file", "read"),
    [
        (f"dataset/{DATASET_FILE}", lambda folder: read_info(folder / "dataset")),
        (f"shards/{MANIFEST_FILE}", lambda folder: read_manifest(folder / "shards")),
        (f"adapter/{RECORD_FILE}", lambda folder: read_record(folder / "adapter")),
        ("checkpoints/checkpoint-3.json", lambda folder: _checkpoints(folder).newest()),
    ],
)
def test_a_file_of_a_newer_version_is_refused(published: Path, file: str, read: Callable[[Path], object]) -> None:
    document = json.loads((published / file).read_text())
    (published / file).write_text(json.dumps({**document, "schema_version": 99}))
    with pytest.raises(UserError, match=r"schema version 99 is newer .*; upgrade minicpmv-finetune"):
        read(published)


def test_a_newer_profile_is_refused(published: Path) -> None:
    profile = published / "profile.yaml"
    profile.write_text(f"schema_version: 99\n{profile.read_text()}")
    with pytest.raises(UserError, match="schema_version"):
        load_profile(profile)
