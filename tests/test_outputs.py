"""The rule for output places, on every kind of place: no byte that the step did not write changes."""

import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from minicpmv_finetune.components.train.checkpoints import claim_local_folder, local_folder
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.outputs import (
    FILES_MARK,
    MARK,
    check_cache,
    check_file,
    check_object_folder,
    claim_workspace,
    claimed_files,
    claimed_folder,
)


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder with the hash of its content, links and empty folders included."""
    found = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = f"link to {path.readlink()}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "folder"
    return found


def write(
    out: str | Path,
    inputs: Mapping[str, str] | None = None,
    step: str = "preprocess",
    content: str = "new",
    beside: Sequence[str] = (),
) -> None:
    """What a step does."""
    files = [Path(out).parent / name for name in beside]
    with claimed_folder(out, step, inputs or {}, files) as place:
        for file in files:
            file.write_text(content)
        with place.assembled() as folder:
            (folder / "manifest.json").write_text(content)
            (folder / "deeper").mkdir()
            (folder / "deeper" / "a.parquet").write_text(content)


def fail(out: Path, rejects: Path | None = None, content: str = "half") -> None:
    """A step that fails after it has written some of its result."""
    with claimed_folder(out, "preprocess", {}, [rejects] if rejects else []) as place, place.assembled() as folder:
        (folder / "manifest.json").write_text(content)
        if rejects:
            rejects.write_text(content)
        raise RuntimeError


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A user's folder with data, images and notes."""
    folder = tmp_path / "mine"
    (folder / "images").mkdir(parents=True)
    (folder / "train.json").write_text("[]")
    (folder / "images" / "a.png").write_bytes(b"png")
    (folder / "notes.txt").write_text("mine")
    return folder


@pytest.mark.parametrize(
    "out",
    [
        pytest.param("{mine}", id="the-input-folder"),
        pytest.param("{mine}/", id="trailing-slash"),
        pytest.param("{mine}/../mine", id="two-dots"),
        pytest.param("{mine}/images", id="in-the-input"),
        pytest.param("{mine}/new", id="new-folder-in-the-input"),
        pytest.param("{mine}/..", id="parent-of-the-input"),
        pytest.param("{mine}/train.json", id="a-file"),
        pytest.param("{link}", id="link-to-the-input"),
        pytest.param("{link}/new", id="below-a-link-to-the-input"),
    ],
)
def test_an_output_that_overlaps_an_input_folder_is_refused(out: str, mine: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(mine)
    before = tree(tmp_path)
    with pytest.raises(UserError):
        write(out.format(mine=mine, link=link), {"--dataset": str(mine)})
    assert tree(tmp_path) == before


@pytest.mark.parametrize("out", ["{mine}", "{mine}/", "{mine}/train.json", "{mine}/images", "{mine}/.."])
def test_an_output_that_holds_an_input_file_or_something_foreign_is_refused(out: str, mine: Path) -> None:
    before = tree(mine.parent)
    with pytest.raises(UserError):
        write(out.format(mine=mine), {"--data": str(mine / "train.json")})
    assert tree(mine.parent) == before


def test_a_file_input_means_the_file_and_not_its_folder(mine: Path) -> None:
    before = tree(mine)
    write(mine / "prepared", {"--data": str(mine / "train.json")})
    assert {name: digest for name, digest in tree(mine).items() if not name.startswith("prepared")} == before


@pytest.mark.parametrize(
    ("out", "dataset"), [("~/mine", "{mine}"), ("{mine}", "~/mine"), ("{mine}/new", "~/mine"), ("~", "~/mine")]
)
def test_the_home_folder_has_two_names(
    out: str, dataset: str, mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    before = tree(tmp_path)
    with pytest.raises(UserError, match="the input --dataset"):
        write(out.format(mine=mine), {"--dataset": dataset.format(mine=mine)})
    assert tree(tmp_path) == before


@pytest.mark.parametrize("out", ["s3://b/a/models", "minio://b/a/models/", "s3://b/a/models/new", "s3://b/a"])
def test_a_place_in_a_store_that_overlaps_an_input_is_refused(out: str) -> None:
    with pytest.raises(UserError, match="the input --base-model"):
        check_object_folder(out, {"--adapter": "/models", "--base-model": "s3://b/a/models"})


def test_a_place_in_a_store_is_a_folder_beside_the_inputs() -> None:
    check_object_folder("s3://b/a/models-2", {"--adapter": "", "--base-model": "s3://b/a/models"})
    with pytest.raises(UserError, match="is a whole bucket; add the name of a folder, such as s3://b/model"):
        check_object_folder("s3://b/", {})


@pytest.mark.parametrize(
    "cache", ["{mine}", "{mine}/images/", "{mine}/new/cache", "s3://bucket/base/", "minio://bucket/base/x"]
)
def test_a_cache_in_an_input_is_refused(cache: str, mine: Path) -> None:
    inputs = {"--dataset": str(mine), "--base-model": "s3://bucket/base"}
    with pytest.raises(UserError, match="is or lies in the input"):
        check_cache(cache.format(mine=mine), inputs)


@pytest.mark.parametrize(
    "cache", ["", "{mine}/..", "{mine}-cache", "s3://bucket", "s3://bucket/base-2", "s3://other/base"]
)
def test_a_cache_may_be_beside_inputs_or_contain_them(cache: str, mine: Path) -> None:
    data = str(mine / "train.json")
    check_cache(cache.format(mine=mine), {"--dataset": str(mine), "--data": data, "--base-model": "s3://bucket/base"})
    check_cache(str(mine), {"--data": data})


@pytest.mark.parametrize("out", [".", "./", "", "sub/.."])
def test_a_working_directory_with_something_in_it_is_refused(
    out: str, mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(mine)
    (mine / "sub").mkdir()
    before = tree(mine)
    with pytest.raises(UserError, match="contains"):
        write(out or ".", {})
    assert tree(mine) == before


@pytest.mark.parametrize("out", [".", "./", "../here"])
def test_an_empty_working_directory_is_accepted_and_stays_the_same_folder(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    number = here.stat().st_ino
    for content in ("first", "second"):
        write(out, {}, content=content)
        assert here.stat().st_ino == number
        assert sorted(tree(here)) == [MARK, "deeper", "deeper/a.parquet", "manifest.json"]
        assert (here / "manifest.json").read_text() == content


def test_a_mount_point_is_assembled_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "mounted"
    out.mkdir()
    number = out.stat().st_ino
    monkeypatch.setattr(Path, "is_mount", lambda path: path == out)
    write(out)
    assert out.stat().st_ino == number
    assert (out / "manifest.json").read_text() == "new"


@pytest.mark.parametrize("is_mount", [False, True])
def test_what_a_killed_attempt_left_is_removed_by_the_next_one(
    is_mount: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: is_mount and path == out)
    code = f"""
import os
from pathlib import Path
from minicpmv_finetune.outputs import claimed_folder
Path.is_mount = lambda path: {is_mount} and path == Path({str(out)!r})
with claimed_folder({str(out)!r}, "preprocess", {{}}) as output, output.assembled() as staging:
    (staging / "large").write_text("half")
    print(staging, flush=True)
    input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as killed:
        assert killed.stdout is not None
        left = Path(killed.stdout.readline().strip())
        (lock,) = left.glob(".*lock")
        os.utime(lock, (0, 0))
        write(out)
        assert (left / "large").is_file()  # still in use
        killed.kill()
    write(out)
    assert not left.exists()
    assert (out / "manifest.json").read_text() == "new"


def test_an_interrupted_training_keeps_its_checkpoints_in_a_mount_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "mounted"
    out.mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == out)
    checkpoints = local_folder("", out)
    assert checkpoints.parent == out

    def train_until_interrupted() -> None:
        with claimed_folder(out, "train", {}):
            claim_local_folder(checkpoints, out, {})
            (checkpoints / "checkpoint-1").mkdir()
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train_until_interrupted()
    assert sorted(entry.name for entry in out.iterdir()) == [checkpoints.name]
    with claimed_folder(out, "train", {}) as output:
        claim_local_folder(checkpoints, out, {})
        with output.assembled() as staging:
            (staging / "training.json").write_text("new")
    assert (checkpoints / "checkpoint-1").is_dir()
    assert (out / "training.json").read_text() == "new"


def test_a_new_volume_is_empty_although_its_file_system_has_a_folder_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "volume"
    (out / "lost+found").mkdir(parents=True)
    with pytest.raises(UserError, match=r"such as lost\+found"):
        write(out)
    monkeypatch.setattr(Path, "is_mount", lambda path: path == out)
    for content in ("first", "second"):
        write(out, content=content)
        assert sorted(tree(out)) == [MARK, "deeper", "deeper/a.parquet", "lost+found", "manifest.json"]
        assert (out / "manifest.json").read_text() == content


@pytest.mark.parametrize("out", ["/proc/x", "/dev/null/x", "/dev/null"])
def test_a_place_that_cannot_be_written_is_one_sentence(out: str) -> None:
    with pytest.raises(UserError, match=out):
        write(out)


def test_an_empty_folder_a_new_one_and_a_link_to_an_empty_one_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for out in ("empty", "new", "deep/er/new", "link"):
        write(tmp_path / out)
        assert (tmp_path / out / "manifest.json").read_text() == "new"
    assert (tmp_path / "link").is_symlink()


def test_a_step_replaces_its_own_result_and_says_so_when_its_inputs_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "out", {"--dataset": "one"}, content="one")
    write(tmp_path / "out", {"--dataset": "one"}, content="again")
    assert capsys.readouterr().err == ""
    write(tmp_path / "out", {"--dataset": "two", "--base-model": ""}, content="two")
    assert "the result of --dataset one is replaced" in capsys.readouterr().err
    write(tmp_path / "out", {"--dataset": "two", "--base-model": "base"}, content="two")
    assert "the result of no --base-model is replaced" in capsys.readouterr().err
    assert (tmp_path / "out" / "manifest.json").read_text() == "two"


def test_another_steps_result_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "out", step="validate-data")
    before = tree(tmp_path)
    with pytest.raises(UserError, match="contains the result of validate-data"):
        write(tmp_path / "out", step="preprocess")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["notes.txt", "deeper/notes.txt", ".hidden"])
def test_what_a_user_adds_to_a_result_is_foreign(name: str, tmp_path: Path) -> None:
    write(tmp_path / "out")
    (tmp_path / "out" / name).write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(UserError, match="did not write"):
        write(tmp_path / "out")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["manifest.json", "deeper/a.parquet"])
@pytest.mark.parametrize("content", ["a longer text of the user", "own"], ids=["other-size", "same-size"])
def test_a_file_of_a_result_that_a_user_has_changed_is_not_replaced(name: str, content: str, tmp_path: Path) -> None:
    write(tmp_path / "out", content="new")
    (tmp_path / "out" / name).write_text(content)
    before = tree(tmp_path)
    with pytest.raises(UserError, match=f"contains {name}, which has changed since preprocess wrote it"):
        write(tmp_path / "out")
    assert tree(tmp_path) == before
    (tmp_path / "out" / name).unlink()
    write(tmp_path / "out", content="again")
    assert (tmp_path / "out" / name).read_text() == "again"


def test_a_file_that_is_added_to_a_finished_result_is_the_steps_own_until_a_user_changes_it(tmp_path: Path) -> None:
    for _ in range(2):
        with claimed_folder(tmp_path / "out", "train", {}) as place:
            with place.assembled() as folder:
                (folder / "training.json").write_text("{}")
            place.add_file("unsent.jsonl", "{}")
    (tmp_path / "out" / "unsent.jsonl").write_text("mine")
    with pytest.raises(UserError, match=r"contains unsent\.jsonl, which has changed"):
        write(tmp_path / "out", step="train")


def test_a_change_while_the_step_runs_stays(tmp_path: Path) -> None:
    write(tmp_path / "out", content="one")

    def run() -> None:
        with claimed_folder(tmp_path / "out", "preprocess", {}) as place, place.assembled() as folder:
            (folder / "manifest.json").write_text("two")
            (tmp_path / "out" / "manifest.json").write_text("mine")

    with pytest.raises(UserError, match="the result is kept in"):
        run()
    assert (tmp_path / "out" / "manifest.json").read_text() == "mine"


@pytest.mark.parametrize("existed", [False, True])
def test_a_failure_leaves_the_place_as_it_was(existed: bool, tmp_path: Path) -> None:
    if existed:
        (tmp_path / "deep" / "out").mkdir(parents=True)
    before = tree(tmp_path)
    with pytest.raises(RuntimeError):
        fail(tmp_path / "deep" / "out")
    assert tree(tmp_path) == before


def test_a_failure_leaves_an_earlier_result(tmp_path: Path) -> None:
    write(tmp_path / "out", content="old")
    before = tree(tmp_path)
    with pytest.raises(RuntimeError):
        fail(tmp_path / "out")
    assert tree(tmp_path) == before


def test_an_attempt_that_was_killed_knows_its_own(tmp_path: Path) -> None:
    claim = claimed_folder(tmp_path / "out", "preprocess", {"--dataset": "d"}, [tmp_path / "rejects.jsonl"])
    claim.__enter__()
    (tmp_path / "rejects.jsonl").write_text("half")
    write(tmp_path / "out", {"--dataset": "d"}, beside=["rejects.jsonl"])
    assert (tmp_path / "rejects.jsonl").read_text() == "new"


class TestFilesBeside:
    def test_one_that_is_there_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "rejects.jsonl").write_text("mine")
        before = tree(tmp_path)
        with pytest.raises(UserError, match=r"rejects\.jsonl: .* did not write the one that is there"):
            write(tmp_path / "out", beside=["rejects.jsonl"])
        assert tree(tmp_path) == before

    def test_one_that_is_an_input_is_refused(self, tmp_path: Path) -> None:
        data = tmp_path / "rejects.jsonl"
        data.write_text("mine")
        with pytest.raises(UserError, match="is also the input --data"):
            write(tmp_path / "out", {"--data": str(data)}, beside=["rejects.jsonl"])
        assert data.read_text() == "mine"

    def test_its_own_is_replaced_until_a_user_changes_it(self, tmp_path: Path) -> None:
        write(tmp_path / "out", beside=["rejects.jsonl"], content="one")
        write(tmp_path / "out", beside=["rejects.jsonl"], content="two")
        write(tmp_path / "another", beside=["rejects.jsonl"], content="three")
        assert (tmp_path / "rejects.jsonl").read_text() == "three"
        (tmp_path / "rejects.jsonl").write_text("mine")
        with pytest.raises(UserError):
            write(tmp_path / "out", beside=["rejects.jsonl"])
        assert (tmp_path / "rejects.jsonl").read_text() == "mine"


class TestUnmarkedResults:
    """Results of 0.1.0 left no mark."""

    @pytest.mark.parametrize(
        ("step", "names"),
        [
            ("validate-data", "dataset.json train.jsonl eval.jsonl duplicates.jsonl"),
            ("preprocess", "manifest.json train-00000.parquet eval-00000.parquet"),
            ("train", "training.json training.html adapter_config.json adapter_model.safetensors README.md"),
            ("train", "training.json trainer_state.json unsent_metrics.jsonl"),
        ],
    )
    def test_they_are_known_by_their_completing_file(self, step: str, names: str, tmp_path: Path) -> None:
        out = tmp_path / "out"
        out.mkdir()
        for name in names.split():
            (out / name).write_text("old")
        write(out, step=step)
        assert sorted(tree(out)) == [MARK, "deeper", "deeper/a.parquet", "manifest.json"]
        assert (out / "manifest.json").read_text() == "new"

    def test_a_link_of_the_users_is_not_replaced(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        claim_workspace(out, "run", {}, links=["model"])
        (out / "model").symlink_to("artifacts/minicpmv-finetune-20260102-030405/merge/model")
        claim_workspace(out, "run", {}, links=["model"])
        (out / "model").unlink()
        (out / "model").symlink_to(tmp_path)
        with pytest.raises(UserError, match="move it away"):
            claim_workspace(out, "run", {}, links=["model"])

    def test_a_folder_of_runs_is_known_by_the_runs(self, tmp_path: Path) -> None:
        (tmp_path / "run.log").write_text("old")
        (tmp_path / "artifacts" / "figures").mkdir(parents=True)
        with pytest.raises(UserError, match="contains files that run did not write"):
            claim_workspace(tmp_path, "run", {})
        (tmp_path / "artifacts" / "minicpmv-finetune-20260102-030405").mkdir()
        claim_workspace(tmp_path, "run", {})
        assert (tmp_path / MARK).is_file()

    @pytest.mark.parametrize("name", ["notes.txt", "train.json", "plan.md", "modeling_minicpmv.py"])
    @pytest.mark.parametrize(
        ("step", "completing"),
        [("validate-data", "dataset.json"), ("preprocess", "manifest.json"), ("train", "training.json")],
    )
    def test_something_foreign_among_them_is_not_touched(
        self, step: str, completing: str, name: str, tmp_path: Path
    ) -> None:
        out = tmp_path / "out"
        out.mkdir()
        (out / completing).write_text("{}")
        (out / name).write_text("mine")
        before = tree(tmp_path)
        with pytest.raises(UserError, match=f"did not write, such as {name}"):
            write(out, step=step)
        assert tree(tmp_path) == before


def test_a_mark_that_cannot_be_read_protects_the_folder(tmp_path: Path) -> None:
    write(tmp_path / "out")
    (tmp_path / "out" / MARK).write_text("{")
    with pytest.raises(UserError):
        write(tmp_path / "out")


def test_the_mark_lists_every_file(tmp_path: Path) -> None:
    write(tmp_path / "out", {"--dataset": "d"})
    mark = json.loads((tmp_path / "out" / MARK).read_text())
    assert (mark["step"], mark["inputs"]) == ("preprocess", {"--dataset": "d"})
    assert list(mark["files"]) == ["deeper/a.parquet", "manifest.json"]


def test_single_files_are_a_steps_own_until_a_user_changes_them(mine: Path) -> None:
    out = mine.parent / "new.jsonl"
    for content in ("one", "two"):
        with claimed_files([out], "import-data", {"SOURCE": str(mine)}):
            out.write_text(content)
    out.write_text("mine")
    before = tree(mine.parent)
    for place in (out, mine / "train.json", mine / "new.jsonl", mine):
        with pytest.raises(UserError), claimed_files([place], "import-data", {"SOURCE": str(mine)}):
            pass
    assert tree(mine.parent) == before


def test_a_list_of_rejects_stays_when_the_step_fails_and_is_replaced_by_the_next_attempt(tmp_path: Path) -> None:
    rejects = tmp_path / "rejects.jsonl"
    for content in ("one", "two"):
        with pytest.raises(RuntimeError):
            fail(tmp_path / "out", rejects, content)
        assert rejects.read_text() == content
        assert not (tmp_path / "out").exists()


def test_readers_without_rights_are_given_them(tmp_path: Path) -> None:
    with claimed_folder(tmp_path / "out", "merge", {}) as place, place.assembled() as folder:
        (folder / "model.safetensors").touch(mode=0o600)
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode & 0o044 == 0o044
    assert os.access(tmp_path / "out", os.R_OK)


def test_a_hidden_folder_of_the_user_is_foreign(tmp_path: Path) -> None:
    write(tmp_path / "out")
    (tmp_path / "out" / ".partial-mine").mkdir()
    (tmp_path / "out" / ".partial-mine" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="did not write"):
        write(tmp_path / "out")
    assert (tmp_path / "out" / ".partial-mine" / "notes.txt").read_text() == "mine"


def test_files_that_are_put_into_the_place_while_a_step_runs_stay(tmp_path: Path) -> None:
    with claimed_folder(tmp_path / "out", "merge", {}) as place, place.assembled() as folder:
        (folder / "config.json").write_text("{}")
        (tmp_path / "out" / "notes.txt").write_text("mine")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "out" / "config.json").read_text() == "{}"


def test_a_file_of_the_same_name_that_appears_while_a_step_runs_is_not_replaced(tmp_path: Path) -> None:
    def run() -> None:
        with claimed_folder(tmp_path / "two", "merge", {}) as place, place.assembled() as folder:
            (folder / "config.json").write_text("{}")
            (tmp_path / "two" / "config.json").write_text("mine")

    with pytest.raises(UserError, match=r"config\.json was put there by something else"):
        run()
    assert (tmp_path / "two" / "config.json").read_text() == "mine"


@pytest.mark.parametrize("mark", [MARK, FILES_MARK])
def test_a_mark_that_another_attempt_is_writing_is_not_foreign(mark: str, tmp_path: Path) -> None:
    out, workspace = tmp_path / "out", tmp_path / "workspace"
    for content in ("first", "second"):
        for folder in (out, workspace):
            folder.mkdir(exist_ok=True)
            (folder / f".{mark}.4711").write_text("{")
        write(out, content=content)
        assert (out / "manifest.json").read_text() == content
        claim_workspace(workspace, "demo", {})


def test_an_attempt_that_fails_may_remove_the_folders_of_another_one(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with ExitStack() as second:
        with suppress(InterruptedError), claimed_folder(out, "merge", {}):
            place = second.enter_context(claimed_folder(out, "merge", {}))
            raise InterruptedError
        with place.assembled() as folder:
            (folder / "config.json").write_text("{}")
    assert (out / "config.json").read_text() == "{}"


def _claim_folder(out: Path) -> None:
    with claimed_folder(out, "preprocess", {}):
        pass


def _claim_workspace(out: Path) -> None:
    claim_workspace(out, "demo", {})


def _check_file(out: Path) -> None:
    check_file(out, "compile")


def _claim_together(claim: Callable[[Path], None], folder: Path, together: Barrier, rounds: int) -> None:
    for number in range(rounds):
        together.wait()
        claim(folder / str(number) / "a/b/c/d/e/f/g/h")  # deep: if folders were created to look, it would take a while


@pytest.mark.parametrize("claim", [_claim_folder, _claim_workspace, _check_file])
def test_two_attempts_of_a_step_may_begin_at_the_same_moment(claim: Callable[[Path], None], tmp_path: Path) -> None:
    processes = multiprocessing.get_context("fork")
    together = processes.Barrier(2, timeout=60)
    attempts = [processes.Process(target=_claim_together, args=(claim, tmp_path, together, 20)) for _ in range(2)]
    for attempt in attempts:
        attempt.start()
    for attempt in attempts:
        attempt.join()
    assert [attempt.exitcode for attempt in attempts] == [0, 0]
