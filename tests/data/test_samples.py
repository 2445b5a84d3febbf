import json
from pathlib import Path

import pytest
from PIL import Image

from minicpmv_finetune.data.checking import inspect_image
from minicpmv_finetune.data.samples import (
    DatasetInfo,
    ImageRef,
    Reject,
    RejectLog,
    Sample,
    content_digest,
    open_image,
    read_info,
)
from minicpmv_finetune.errors import UserError


def sample(**changes: object) -> Sample:
    content = {
        "id": "a",
        "source": "train.json",
        "pictures": [{"uri": "/data/a.png", "sha256": "0" * 64, "width": 3, "height": 2}],
        "turns": [{"role": "user", "parts": [0, "What?"]}, {"role": "assistant", "parts": ["That."]}],
    }
    return Sample.model_validate({**content, **changes})


def write_rejects(path: Path, number: int) -> RejectLog:
    with RejectLog(path) as rejects:
        for index in range(number):
            reject = Reject(file="train.json", index=index, id=None, reason="roles", message=f"sentence {index}")
            rejects.append(reject, "train")
    return rejects


def test_an_image_that_changed_after_validation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 3), "red").save(path)
    image = inspect_image(str(path)).ref
    assert open_image(image).size == (4, 3)
    Image.new("RGB", (4, 3), "blue").save(path)
    with pytest.raises(UserError, match=r"a\.png: changed since it was validated"):
        open_image(image)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "validate-data has not finished"),
        ("{", "damaged or written by another program"),
        ("[]", "damaged or written by another program"),
        ('{"schema_version": 1}', "damaged or written by another program"),
        ('{"schema_version": 99, "unknown": true}', "schema version 99 is newer"),
    ],
)
def test_a_dataset_that_cannot_be_read_is_explained(content: str | None, sentence: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(UserError, match=sentence):
        read_info(tmp_path)


def test_info_round_trip(tmp_path: Path) -> None:
    info = DatasetInfo(fingerprint="f", rows={"train": 3, "eval": 1}, rejected={"roles": 2})
    (tmp_path / "dataset.json").write_text(info.model_dump_json())
    assert read_info(tmp_path) == info


def test_the_content_digest_covers_texts_images_and_evaluation_fields() -> None:
    image = {"uri": "s3://elsewhere/b.png", "sha256": "0" * 64, "width": 3, "height": 2}
    assert content_digest(sample()) == content_digest(sample(id="b", source="other.json", index=7, pictures=[image]))
    assert content_digest(sample()) != content_digest(sample(pictures=[{**image, "sha256": "1" * 64}]))
    turns = [{"role": "user", "parts": ["What?", 0]}, {"role": "assistant", "parts": ["That."]}]
    assert content_digest(sample()) != content_digest(sample(turns=turns))
    for change in ({"metric": "anls"}, {"tags": ("a",)}, {"answers": ("This.",)}):
        assert content_digest(sample()) != content_digest(sample(**change))


def conversation(*trained: bool) -> Sample:
    turns: list[dict[str, object]] = []
    for number, loss in enumerate(trained):
        turns.append({"role": "user", "parts": [f"question {number}"]})
        turns.append({"role": "assistant", "parts": [f"answer {number}"], "loss": loss})
    return sample(turns=turns, pictures=[])


@pytest.mark.parametrize(
    ("trained", "scored"),
    [((True,), 0), ((True, True), 1), ((True, False), 0), ((False, True, False, False), 1), ((False,), 0)],
)
def test_evaluation_scores_the_last_answer_that_is_trained(trained: tuple[bool, ...], scored: int) -> None:
    cut = conversation(*trained).up_to_scored_turn()
    assert cut.turns == conversation(*trained).turns[: 2 * scored + 2]


def test_an_answer_without_loss_changes_the_digest_and_no_other_digest_changes() -> None:
    assert content_digest(conversation(True, True)) == (
        "3ec0a1fee09d00ede740ef96faabf40573ffed144390dd3e9f28e5b2a8a9ba98"
    )
    assert (
        len({content_digest(conversation(*trained)) for trained in ((True, True), (True, False), (False, True))}) == 3
    )


def test_samples_have_the_keys_of_published_files() -> None:
    image = ImageRef(uri="a.png", sha256="0" * 64, width=3, height=2, rotated=True)
    written = sample(pictures=[image]).model_dump_json(exclude_defaults=True)
    assert json.loads(written)["pictures"][0] == {
        "uri": "a.png",
        "sha256": "0" * 64,
        "width": 3,
        "height": 2,
        "turned": True,
    }
    assert Sample.model_validate_json(written).images == (image,)


def test_rejects_are_one_json_object_a_line(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rejects.jsonl"
    write_rejects(path, 2)
    assert [json.loads(line)["index"] for line in path.read_text().splitlines()] == [0, 1]


def test_rejects_up_to_the_ratio_are_allowed(tmp_path: Path) -> None:
    write_rejects(tmp_path / "rejects.jsonl", 5).refuse_too_many(95, 0.05)
    with pytest.raises(UserError, match=r"6 of 100 samples \(6.0%\).*train.json, sample 0: sentence 0"):
        write_rejects(tmp_path / "rejects.jsonl", 6).refuse_too_many(94, 0.05)


def test_the_place_of_invalid_json_is_a_line() -> None:
    assert Reject(file="train.json", line=3, id=None, reason="invalid_json", message="").place == "train.json, line 3"
