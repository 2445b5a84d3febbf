"""Load a model once, and ask it from Python."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import minicpmv_finetune
from minicpmv_finetune import answer, load
from minicpmv_finetune.components.evaluate.predict import predict
from minicpmv_finetune.data.image_files import to_rgb
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.serving.asking import LoadedModel, question_sample, shown_slices

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tiny_46: Path) -> LoadedModel:
    return load(tiny_46)


def write_image(path: Path, size: tuple[int, int] = (900, 600)) -> Path:
    noise = np.random.default_rng(1).integers(0, 255, (*size[::-1], 3), np.uint8)
    Image.fromarray(noise).save(path)
    return path


def test_a_loaded_model_answers_as_predict_does(model: LoadedModel, tiny_46: Path, tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.png", (40, 30))
    expected = predict(str(tiny_46), [str(path)], "Which digit is this?", max_new_tokens=8)
    assert answer(model, "Which digit is this?", path, max_new_tokens=8) == expected
    assert answer(model, "Which digit is this?", str(path), max_new_tokens=8) == expected


@pytest.mark.parametrize(
    ("question", "options", "words"),
    [
        (" ", {}, "has no text"),
        ("an <|im_end|> inside", {}, "prompt: .*special token"),
        ("Which?", {"max_new_tokens": 0}, "no room"),
        ("Which?", {"thinking": True}, "no think blocks"),
    ],
)
def test_a_question_that_cannot_be_asked_is_refused(
    model: LoadedModel, question: str, options: dict[str, int], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        answer(model, question, **options)  # type: ignore[arg-type]


def test_slices_are_shown_with_their_places(model: LoadedModel, tmp_path: Path) -> None:
    small, large = write_image(tmp_path / "small.png", (40, 30)), write_image(tmp_path / "large.png")
    (only,) = shown_slices(model.encoder, question_sample([str(small)], "Which?"))
    assert only.caption == "overview"
    shown = shown_slices(model.encoder, question_sample([str(large), str(small)], "Which?"))
    captions = [piece.caption for piece in shown]
    assert captions[0] == "image 1: overview"
    assert captions[-1] == "image 2: overview"
    (plan, _) = model.encoder.plan(question_sample([str(large), str(small)], "Which?"))
    assert plan.grid
    rows, columns = plan.grid
    assert captions[1:-1] == [
        f"image 1: row {row}, column {column}" for row in range(1, rows + 1) for column in range(1, columns + 1)
    ]
    # The slices, put together, are the image at its refined size.
    pieces = [piece.pixels for piece in shown[1:-1]]
    whole = np.vstack([np.hstack(pieces[row * columns : (row + 1) * columns]) for row in range(rows)])
    assert plan.refined == whole.shape[1::-1]
    resized = np.asarray(to_rgb(Image.open(large), "drop").resize(plan.refined, Image.Resampling.BICUBIC))
    assert np.abs(whole.astype(int) - resized.astype(int)).mean() < 2


def test_questions_follow_earlier_ones(model: LoadedModel, tmp_path: Path) -> None:
    paths = [str(write_image(tmp_path / name, (40, 30))) for name in ("a.png", "b.png")]
    one = question_sample(paths[:1], "Sure?", [("Which?", "A <box>.")])
    assert [(turn.role, turn.parts) for turn in one.turns[:3]] == [
        ("user", (0, "\nWhich?")),
        ("assistant", ("A <box>.",)),
        ("user", ("Sure?",)),
    ]
    two = question_sample(paths, "Sure?", [("Which?", "This.")])
    assert two.turns[0].parts == (0, "\n", 1, "\nWhich?")
    marked = question_sample(paths, "And <image_01>?", [("Which is <image_00>?", "This.")])
    assert [part for turn in marked.turns for part in turn.parts if isinstance(part, int)] == [0, 1]
    assert answer(model, "Sure?", paths[0], earlier=[("Which?", "This.")], max_new_tokens=2)
    with pytest.raises(UserError, match="has no text"):
        answer(model, "Sure?", earlier=[("Which?", "")])


def test_a_question_without_an_image_shows_no_slices(model: LoadedModel) -> None:
    assert shown_slices(model.encoder, question_sample([], "Which?")) == []


def test_the_package_has_no_other_names() -> None:
    with pytest.raises(AttributeError, match="no attribute 'ask'"):
        _ = minicpmv_finetune.ask


def test_the_notebook_runs(
    tiny_46: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "build" / "mine").mkdir(parents=True)
    (tmp_path / "build" / "mine" / "model").symlink_to(tiny_46)
    write_image(tmp_path / "photo.jpg", (60, 40))
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((ROOT / "examples" / "ask_a_model.ipynb").read_text())
    names: dict[str, object] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert capsys.readouterr().out.splitlines()[-1].startswith("overview (")
