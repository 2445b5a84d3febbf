"""What data may name: with `MINICPMV_FINETUNE_ALLOWED_URIS` nothing outside is read, whichever way it is written."""

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


def _image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), (len(str(path)) % 256, 80, 90)).save(path)


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that may be read, beside others that may not; the address of the one begins as that of another."""
    house = tmp_path / "house"
    for place in (house / "inside.png", tmp_path / "outside.png", tmp_path / "house-of-others" / "a.png"):
        _image(place)
    (house / "link.png").symlink_to(tmp_path / "outside.png")
    (house / "door").symlink_to(tmp_path)
    content = io.BytesIO()
    Image.new("RGB", (32, 32)).save(content, "PNG")
    for shard in (house / "0.tar", tmp_path / "1.tar"):
        with tarfile.open(shard, "w") as tar:
            member = tarfile.TarInfo("a.png")
            member.size = len(content.getvalue())
            tar.addfile(member, io.BytesIO(content.getvalue()))
    (house / "link.tar").symlink_to(tmp_path / "1.tar")
    monkeypatch.setenv(environment.ALLOWED_URIS.name, f"{house} s3://ours/data/")
    return house


def _rejects(house: Path, tmp_path: Path, images: list[str]) -> dict[str, str]:
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
    (house / "data.json").write_text(json.dumps(samples))
    rejects = tmp_path / "rejects.jsonl"
    validate_data(
        str(house / "data.json"),
        "",
        tmp_path / "dataset",
        rejects,
        ValidationSettings(max_reject_ratio=1, eval_fraction=0),
    )
    return {line["id"]: line["reason"] for line in map(json.loads, rejects.read_text().splitlines())}


def test_no_image_outside_is_read(house: Path, tmp_path: Path) -> None:
    outside = [
        "../outside.png",
        str(tmp_path / "outside.png"),
        "link.png",
        "door/outside.png",
        "../house-of-others/a.png",
        "../1.tar!a.png",
        "link.tar!a.png",
        "s3://theirs/data/a.png",
        "s3://ours/database/a.png",
        "http://169.254.169.254/latest/meta-data/",
        "file:///etc/hostname",
    ]
    assert _rejects(house, tmp_path, ["inside.png", "0.tar!a.png", *outside]) == dict.fromkeys(outside, "image_refused")


def test_data_itself_must_lie_inside(house: Path, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text("[]")
    with pytest.raises(UserError, match="outside of what this step may read"):
        validate_data(
            str(tmp_path / "data.json"), "", tmp_path / "dataset", tmp_path / "rejects.jsonl", ValidationSettings()
        )


def test_without_the_variable_every_place_is_allowed(house: Path, tmp_path: Path) -> None:
    del os.environ[environment.ALLOWED_URIS.name]
    assert _rejects(house, tmp_path, ["inside.png", "../outside.png", "link.png"]) == {}
