"""With `MINICPMV_FINETUNE_ALLOWED_URIS` a step reads nothing outside of the allowed folders, however data names it."""

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from minicpmv_finetune import environment
from minicpmv_finetune.components.validate_data.validate import ValidationSettings, validate_data
from minicpmv_finetune.errors import UserError


def _write_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), (len(str(path)) % 256, 80, 90)).save(path)


@pytest.fixture
def allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that may be read, beside others that may not; the path of one of these begins with the same text."""
    allowed = tmp_path / "allowed"
    for path in (allowed / "inside.png", tmp_path / "outside.png", tmp_path / "allowed-not" / "a.png"):
        _write_image(path)
    (allowed / "link.png").symlink_to(tmp_path / "outside.png")
    (allowed / "linked").symlink_to(tmp_path)
    content = io.BytesIO()
    Image.new("RGB", (32, 32)).save(content, "PNG")
    for shard in (allowed / "0.tar", tmp_path / "1.tar"):
        with tarfile.open(shard, "w") as tar:
            member = tarfile.TarInfo("a.png")
            member.size = len(content.getvalue())
            tar.addfile(member, io.BytesIO(content.getvalue()))
    (allowed / "link.tar").symlink_to(tmp_path / "1.tar")
    monkeypatch.setenv(environment.ALLOWED_URIS.name, f"{allowed} s3://ours/data/")
    return allowed


def _validate(allowed: Path, tmp_path: Path, images: list[str]) -> dict[str, str]:
    """Validate a sample of each image; returns the reason code of each rejected image."""
    samples = [
        {
            "id": image,
            "image": image,
            "conversations": [
                {"role": "user", "content": f"<image>\nWhich {number}?"},
                {"role": "assistant", "content": f"{number}"},
            ],
        }
        for number, image in enumerate(images)
    ]
    (allowed / "data.json").write_text(json.dumps(samples))
    rejects = tmp_path / "rejects.jsonl"
    validate_data(
        str(allowed / "data.json"),
        "",
        tmp_path / "dataset",
        rejects,
        ValidationSettings(max_reject_ratio=1, eval_fraction=0),
    )
    return {line["id"]: line["reason"] for line in map(json.loads, rejects.read_text().splitlines())}


def test_no_image_outside_is_read(allowed: Path, tmp_path: Path) -> None:
    outside = [
        "../outside.png",
        str(tmp_path / "outside.png"),
        "link.png",
        "linked/outside.png",
        "../allowed-not/a.png",
        "../1.tar!a.png",
        "link.tar!a.png",
        "s3://theirs/data/a.png",
        "s3://ours/database/a.png",
        "http://169.254.169.254/latest/meta-data/",
        "file:///etc/hostname",
    ]
    assert _validate(allowed, tmp_path, ["inside.png", "0.tar!a.png", *outside]) == dict.fromkeys(
        outside, "image_refused"
    )


def test_the_data_file_itself_must_be_inside(allowed: Path, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text("[]")
    with pytest.raises(UserError, match="outside of the folders that this step may read"):
        validate_data(
            str(tmp_path / "data.json"), "", tmp_path / "dataset", tmp_path / "rejects.jsonl", ValidationSettings()
        )


def test_without_the_variable_every_place_is_allowed(allowed: Path, tmp_path: Path) -> None:
    del os.environ[environment.ALLOWED_URIS.name]
    assert _validate(allowed, tmp_path, ["inside.png", "../outside.png", "link.png"]) == {}
