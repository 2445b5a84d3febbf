"""The one rule for every place that a command writes to: nothing of the user's is changed.

An output place is absent, empty, or was written by this very step before. It is no input, lies in no input and contains
none. A step can tell its own results by a mark that it leaves in the folder before the first byte of a result: the
step, what the result was made from, and the files that belong to it, each with its size and the time of its last
change, since a model is too large to hash before each run. Whatever the mark does not list, and what has changed since,
is foreign, and a folder with something foreign is refused. Files that a step writes beside its folder, such as a list
of rejects, count as output too; a hidden list in their folder says which step wrote them, and with which content.

A result is assembled in a hidden folder beside the final one and renamed. Where that cannot be, because the place is
the working directory or a mount point, it is assembled inside and its files are moved one by one, the completing file
last: without it a result does not exist.
"""

import fcntl
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path, PurePosixPath

from pydantic import BaseModel, TypeAdapter, ValidationError

from minicpmv_finetune import storage
from minicpmv_finetune.errors import UserError

from .terminal import print_sentence

MARK = ".minicpmv-finetune.json"
FILES_MARK = ".minicpmv-finetune-files.json"
_LOCK = ".minicpmv-finetune-lock"
_SECONDS_TO_LOCK = 60
_PARTIAL = ".minicpmv-finetune-partial-"
_UNFINISHED = (_PARTIAL, f".{MARK}.", f".{FILES_MARK}.")  # the last two: `storage.write_bytes` renames a written file
_OF_FILE_SYSTEM = "lost+found"  # a folder at the root of a new ext4 volume
_COMPLETING = ("dataset.json", "manifest.json", "training.json", "config.json")
_UNMARKED: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "validate-data": ("dataset.json", ("train.jsonl", "eval.jsonl", "duplicates.jsonl")),
    "preprocess": ("manifest.json", ("*.parquet",)),
    "train": (
        "training.json",
        (
            *("training.html", "trainer_state.json", "unsent_metrics.jsonl", "checkpoint-[0-9]*", "README.md"),
            *("adapter_config.json", "adapter_model.safetensors", "config.json", "generation_config.json"),
            *("model*.safetensors", "model.safetensors.index.json", "chat_template.jinja", "configuration.json"),
            *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
            *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
            *("added_tokens.json", "vocab.json", "merges.txt"),
        ),
    ),
}
"""How results of 0.1.0, which left no mark, are known: by the completing file and the names of the others."""
_RUNS_OF_0_1_0 = ("artifacts/minicpmv-*-*", "run.log")


class _Mark(BaseModel):
    """What a step leaves in its output folder.

    Attributes:
        step: The step that wrote the folder.
        inputs: What the result was made from, by the names of the step's options.
        files: Paths of the result's files, relative to the folder, each with its `_state`; empty where it is not known.
    """

    step: str
    inputs: dict[str, str] = {}
    files: dict[str, str] = {}

    def own_files(self, folder: Path) -> set[str]:
        """The files of the result that nobody has changed, and the folders that contained them."""
        parents = {str(parent): "folder" for name in self.files for parent in PurePosixPath(name).parents}
        return {name for name, state in {**parents, **self.files}.items() if state in ("", _state(folder / name))}


class _WrittenFile(BaseModel):
    """A single file that a step wrote.

    Attributes:
        step: The step.
        inputs: What the file was made from, by the names of the step's options.
        sha256: Of the content; empty while the file is being written.
    """

    step: str
    inputs: dict[str, str] = {}
    sha256: str = ""


_WRITTEN_FILES = TypeAdapter(dict[str, _WrittenFile])


@dataclass(frozen=True)
class OutputFolder:
    """A folder that a step has claimed.

    Attributes:
        path: The folder itself, links followed.
        mark: What is known of it.
    """

    path: Path
    mark: _Mark

    def add_file(self, name: str, content: str) -> None:
        """Write one more file into the finished result."""
        mark = _read_mark(self.path)
        _write_mark(self.path, mark.model_copy(update={"files": {**mark.files, name: ""}}))
        (self.path / name).write_text(content)
        _write_mark(self.path, mark.model_copy(update={"files": {**mark.files, name: _state(self.path / name)}}))

    @contextmanager
    def assembled(self) -> Iterator[Path]:
        """A folder to write the result into, which becomes the output when the block ends without an error."""
        inside = _must_be_assembled_inside(self.path)
        keep = False
        staging, lock = _make_staging(self.path, inside)
        try:
            yield staging
            (staging / _LOCK).unlink()
            storage.make_readable(staging)
            files = {name: _state(staging / name) for name in sorted(_entries_below(staging))}
            mark = self.mark.model_copy(update={"files": files})
            added = set(_entries_below(self.path)) - _read_mark(self.path).own_files(self.path)
            if added & set(files):
                keep = True
                raise UserError(
                    f"{self.path}: {min(added & set(files))} was put there by something else while {mark.step} ran; "
                    f"the result is kept in {staging}."
                )
            if inside or added:
                self._move_in(staging, mark)
            else:
                _write_mark(staging, mark)
                storage.swap_in(staging, self.path)
        finally:
            if not keep:
                shutil.rmtree(staging, ignore_errors=True)
            os.close(lock)

    def _move_in(self, staging: Path, mark: _Mark) -> None:
        before = _read_mark(self.path).own_files(self.path)
        _write_mark(self.path, mark.model_copy(update={"files": dict.fromkeys(sorted({*before, *mark.files}), "")}))
        for name in sorted(before, key=_completing_first):
            _remove(self.path, name)
        for name in sorted(mark.files, key=_completing_first, reverse=True):
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
            (staging / name).replace(self.path / name)
        _write_mark(self.path, mark)


@contextmanager
def claimed_folder(
    out: str | Path, step: str, inputs: Mapping[str, str], beside: Sequence[Path] = ()
) -> Iterator[OutputFolder]:
    """Claim a local folder for a step's result; a failure leaves it as it was.

    Args:
        out: The output folder.
        step: Name of the step that writes it.
        inputs: Paths or URIs that the step reads, by the names of its options.
        beside: Files that the step writes outside of the folder; they stay when the step fails.

    Raises:
        UserError: The place is an input, overlaps one, is a file, cannot be written, or contains something foreign.
    """
    known = check_folder(out, step, inputs)
    path = storage.real_path(str(out))
    is_of_0_1_0 = known is not None and not (path / MARK).exists()
    with claimed_files(beside, step, inputs, trusts_existing=is_of_0_1_0):
        if known and known.inputs and known.inputs != dict(inputs):
            print_sentence(f"{out}: the result of {_difference(known.inputs, inputs)} is replaced.")
        mark = _Mark(step=step, inputs=dict(inputs), files=known.files if known else {})
        created = _create(out, path)
        try:
            if not (path / MARK).exists():
                _write_mark(path, mark)
            yield OutputFolder(path, mark)
        except BaseException:
            if known is None:
                (path / MARK).unlink(missing_ok=True)
                for folder in created:
                    with suppress(OSError):
                        folder.rmdir()
            raise


def check_folder(out: str | Path, step: str, inputs: Mapping[str, str]) -> _Mark | None:
    """Refuse an output folder that may not be written, before any work; returns the mark of an earlier result.

    Raises:
        UserError: As `claimed_folder`.
    """
    _refuse_store(out, step)
    path = storage.real_path(str(out))
    _refuse_overlap(str(out), path, inputs)
    known = _refuse_foreign_files(out, path, step)
    _try_to_write(out, path)
    return known


def folder_beside(out: Path) -> Path:
    """The folder for the files that a step writes beside its output: the output itself where it is assembled inside."""
    path = storage.real_path(str(out))
    return path if _must_be_assembled_inside(path) else path.parent


def work_folder(out: Path, name: str) -> Path:
    """The hidden folder for what a step keeps until its result is complete.

    It is beside the output; in the output where that is a mount point, or where nothing can be written beside it.
    """
    path = storage.real_path(str(out))
    return path / f"{_PARTIAL}{name}" if _has_no_place_beside(path) else path.with_name(f".{path.name}.{name}")


def check_object_folder(out: str, inputs: Mapping[str, str]) -> None:
    """Refuse a bucket, and a folder in a store that is, contains or lies in an input; the upload checks its objects.

    Raises:
        UserError: As the text says.
    """
    place = _in_store(out)
    if place.count("/") == 1:
        raise UserError(f"{out}: is a whole bucket; add the name of a folder, such as {out.rstrip('/')}/model.")
    for name, value in inputs.items():
        other = _in_store(value)
        if storage.is_object_uri(value) and (other.startswith(place) or place.startswith(other)):
            raise UserError(f"{out}: is, contains or lies in the input {name} ({value}); choose another output.")


def check_cache(cache: str, inputs: Mapping[str, str]) -> None:
    """Refuse a cache that is an input or lies in one; other files beside it do not matter, since a cache only adds.

    Args:
        cache: Folder or URI of the cache; empty for the default.
        inputs: Paths or URIs that the step reads, by the names of its options.

    Raises:
        UserError: As the text says, or the cache is no local path and no URI of a store.
    """
    if not cache:
        return
    in_store = storage.is_object_uri(cache)
    place = Path() if in_store else storage.real_path(cache)
    for name, value in inputs.items():
        if in_store:
            is_inside = storage.is_object_uri(value) and _in_store(cache).startswith(_in_store(value))
        else:
            is_inside = any(other in (place, *place.parents) for other in _local_places(value))
        if is_inside:
            raise UserError(f"{cache}: is or lies in the input {name} ({value}); choose another cache.")


def _in_store(uri: str) -> str:
    """Bucket and key of a folder, whichever of the two schemes names it, with a slash at the end."""
    return f"{uri.partition('://')[2].rstrip('/')}/"


def check_file(out: Path, step: str) -> None:
    """Refuse the place of a single file that cannot be written there.

    Raises:
        UserError: The place is a folder or in a store, or its folder cannot be written.
    """
    _refuse_store(out, step)
    path = storage.real_path(str(out))
    if path.is_dir():
        raise UserError(f"{out}: is a folder, but {step} writes a file; add a name.")
    _try_to_write(out, path.parent)


@contextmanager
def claimed_files(
    files: Sequence[Path], step: str, inputs: Mapping[str, str], trusts_existing: bool = False
) -> Iterator[None]:
    """Claim single files for a step, and record their content at the end, whether or not the step fails.

    Args:
        files: The files.
        step: Name of the step that writes them.
        inputs: Paths or URIs that the step reads, by the names of its options.
        trusts_existing: Whether existing files are the step's own although no record says so.

    Raises:
        UserError: A file is an input, lies in one, or exists and was not written by this step.
    """
    places = [storage.real_path(str(file)) for file in files]
    for place in places:
        _refuse_overlap(str(place), place, inputs)
        if os.path.lexists(place) and not trusts_existing:
            written = _read_written_files(place.parent).get(place.name)
            if written is None or written.step != step or written.sha256 not in ("", _digest(place)):
                raise UserError(
                    f"{place}: {step} writes this file, but did not write the one that is there; move it away, or "
                    "choose an output in another folder."
                )
            if written.inputs and written.inputs != dict(inputs):
                print_sentence(f"{place}: that of {_difference(written.inputs, inputs)} is replaced.")
    for place in places:
        _record_written_file(place, _WrittenFile(step=step, inputs=dict(inputs)))
    try:
        yield
    finally:
        for place in places:
            written = _WrittenFile(step=step, inputs=dict(inputs), sha256=_digest(place))
            _record_written_file(place, written if place.is_file() else None)


def claim_workspace(
    out: Path,
    step: str,
    inputs: Mapping[str, str],
    links: Sequence[str] = (),
    known_by: Sequence[str] = _RUNS_OF_0_1_0,
) -> None:
    """Claim a folder that several runs share: each adds to it, and replaces nothing but these links.

    Arguments and errors are those of `check_workspace`.
    """
    path = storage.real_path(str(out))
    is_known = check_workspace(out, step, inputs, links, known_by)
    _create(out, path)
    if not is_known:
        _write_mark(path, _Mark(step=step, inputs=dict(inputs)))


def check_workspace(
    out: Path,
    step: str,
    inputs: Mapping[str, str],
    links: Sequence[str] = (),
    known_by: Sequence[str] = _RUNS_OF_0_1_0,
) -> bool:
    """Refuse a folder that several runs share if it may not be written, before any work.

    Args:
        out: The folder.
        step: What uses the folder.
        inputs: Paths or URIs that are read, by the names of the options.
        links: Names of symbolic links that each run sets again.
        known_by: Patterns of paths that such a folder of 0.1.0 contains.

    Returns:
        Whether the folder has this step's mark already.

    Raises:
        UserError: The folder is an input, overlaps one, cannot be written, or is used by something else.
    """
    _refuse_store(out, step)
    path = storage.real_path(str(out))
    _refuse_overlap(str(out), path, inputs)
    if os.path.lexists(path) and not path.is_dir():
        raise UserError(f"{out}: is a file, but {step} writes a folder; choose another output.")
    names = _names_in(path) if path.is_dir() else set()
    is_known = MARK in names and _read_mark(path).step == step
    is_of_0_1_0 = MARK not in names and all(any(path.glob(known)) for known in known_by)
    if names and not (is_known or is_of_0_1_0):
        raise UserError(
            f"{out}: contains files that {step} did not write, such as {min(names)}; choose a new or empty folder."
        )
    for name in links:
        link = path / name
        if os.path.lexists(link) and not (link.is_symlink() and link.resolve().is_relative_to(path)):
            raise UserError(f"{link}: {step} would replace this with a link to its result; move it away.")
    _try_to_write(out, path)
    return is_known


def release_workspace(out: Path) -> None:
    """Remove a folder that `claim_workspace` claimed, if nothing but its mark is left in it."""
    with suppress(OSError):
        if {entry.name for entry in out.iterdir()} <= {MARK}:
            (out / MARK).unlink(missing_ok=True)
            out.rmdir()


def _refuse_store(out: str | Path, step: str) -> None:
    if store := re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/+", str(out)):
        shown = f"{store[1]}://{str(out)[store.end() :]}"  # a Path has lost a slash
        raise UserError(f"{shown}: {step} writes to this machine, not to a store; give a local path.")


def _refuse_overlap(out: str, path: Path, inputs: Mapping[str, str]) -> None:
    for name, value in inputs.items():
        for place in _local_places(value):
            if place == path:
                raise UserError(f"{out}: is also the input {name}; choose another output.")
            if path in place.parents:
                raise UserError(f"{out}: contains the input {name} ({value}); choose another output.")
            if place.is_dir() and place in path.parents:
                raise UserError(f"{out}: lies in the input {name} ({value}); choose another output.")


def _local_places(value: str) -> list[Path]:
    """The files and folders on this machine that an input names; none for a store, a hub or a missing path."""
    if not value or storage.is_object_uri(value) or "://" in value or value[:5].lower() == "data:":
        return []
    try:
        found = [storage.real_path(name) for name in storage.expand(value)]
    except UserError:
        return []  # the step itself reports what is missing
    return [path for path in found if path.exists()]


def _refuse_foreign_files(out: str | Path, path: Path, step: str) -> _Mark | None:
    """The mark of an earlier result of this step, None where the place is absent or empty."""
    if not os.path.lexists(path):
        return None
    if not path.is_dir():
        raise UserError(f"{out}: is a file, but {step} writes a folder; choose another output.")
    names = _names_in(path) - _own_single_files(path, step)
    if not names:
        return None
    if MARK in names:
        mark = _read_mark(path)
    else:
        if foreign := _foreign_to_unmarked(names, step):
            raise UserError(
                f"{out}: contains files that {step} did not write, such as {min(foreign)}; choose a new or empty "
                "folder."
            )
        mark = _Mark(step=step, files=dict.fromkeys(_entries_below(path), ""))
    if mark.step != step:
        raise UserError(f"{out}: contains the result of {mark.step}; choose another output.")
    foreign = set(_entries_below(path)) - mark.own_files(path) - _own_single_files(path, step)
    if foreign:
        name = min(foreign)
        reason = f"has changed since {step} wrote it" if name in mark.files else f"{step} did not write"
        raise UserError(f"{out}: contains {name}, which {reason}; move it away, or choose another output.")
    return mark


def _own_single_files(folder: Path, step: str) -> set[str]:
    """Names of the files in a folder that a step wrote beside its result, their list included."""
    names = {
        name
        for name, written in _read_written_files(folder).items()
        if written.step == step and written.sha256 in ("", _digest(folder / name))
    }
    return {FILES_MARK, *names} if names else names


def _read_written_files(folder: Path) -> dict[str, _WrittenFile]:
    try:
        return _WRITTEN_FILES.validate_json((folder / FILES_MARK).read_bytes())
    except (OSError, ValidationError):
        return {}


def _record_written_file(place: Path, written: _WrittenFile | None) -> None:
    """Note in a file's folder that a step writes the file, or that it did not."""
    records = _read_written_files(place.parent)
    if written is None:
        records.pop(place.name, None)
    else:
        records[place.name] = written
    mark = place.parent / FILES_MARK
    if records:
        storage.write_bytes(str(mark), _WRITTEN_FILES.dump_json(records, indent=1))
    else:
        mark.unlink(missing_ok=True)


def _create(out: str | Path, path: Path) -> list[Path]:
    """Create the folder; returns the created folders, the deepest first."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        with _explained(out):
            path.mkdir(parents=True, exist_ok=True)
        _try_to_write(out, path)
    except UserError:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
        raise
    return missing


def _try_to_write(out: str | Path, path: Path) -> None:
    """Write into a folder, or into the next parent that exists.

    The folder is not created for this: another attempt of the same step may be about to write into it.
    """
    with _explained(out):
        folder = next(folder for folder in (path, *path.parents) if folder.exists())
        with tempfile.TemporaryFile(prefix=_PARTIAL, dir=folder):
            pass


@contextmanager
def _explained(out: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); choose another output.") from error


def _make_staging(out: Path, inside: bool) -> tuple[Path, int]:
    """A new hidden folder in or beside an output, and the descriptor of the lock that shows that it is in use.

    A process that was killed leaves its folder, which may contain a whole model, but not its lock: such folders are
    removed. A folder of the last minute stays, since its lock may be about to be taken.
    """
    parent, prefix = (out, _PARTIAL) if inside else (out.parent, f".{out.name}.")
    for lock in parent.glob(f"{escape(prefix)}*/{_LOCK}"):
        with suppress(OSError), lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - lock.stat().st_mtime > _SECONDS_TO_LOCK:
                shutil.rmtree(lock.parent)
                print_sentence(f"{lock.parent}: what an interrupted attempt left is removed.")
    parent.mkdir(parents=True, exist_ok=True)  # another attempt that failed may have removed it
    staging = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    held = os.open(staging / _LOCK, os.O_CREAT | os.O_WRONLY)
    with suppress(OSError):  # of a file system without locks, where nothing is removed either
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return staging, held


def _must_be_assembled_inside(path: Path) -> bool:
    return path == Path.cwd() or _has_no_place_beside(path)


def _has_no_place_beside(path: Path) -> bool:
    return path.is_mount() or (path.is_dir() and not os.access(path.parent, os.W_OK))


def _names_in(folder: Path) -> set[str]:
    """Names of what is in a folder, without what belongs to the file system and what an attempt has not finished."""
    names = {entry.name for entry in folder.iterdir()} - _names_of_file_system(folder)
    return {name for name in names if not name.startswith(_UNFINISHED)}


def _names_of_file_system(folder: Path) -> set[str]:
    return {_OF_FILE_SYSTEM} if folder.is_mount() else set()


def _entries_below(folder: Path) -> Iterator[str]:
    """Relative paths of files and empty folders, without the mark and what an attempt has not finished."""
    skipped = {MARK, *_names_of_file_system(folder)}
    for path in folder.rglob("*"):
        relative = path.relative_to(folder)
        is_skipped = relative.parts[0] in skipped or relative.parts[0].startswith(_UNFINISHED)
        if not is_skipped and (path.is_symlink() or not path.is_dir() or not any(path.iterdir())):
            yield relative.as_posix()


def _state(path: Path) -> str:
    """What changes whenever somebody writes to a file, and not when it is renamed."""
    try:
        found = path.lstat()
    except OSError:
        return "missing"
    return "folder" if stat.S_ISDIR(found.st_mode) else f"{found.st_size} bytes at {found.st_mtime_ns}"


def _remove(folder: Path, name: str) -> None:
    """Remove a file or an empty folder, and the folders that are empty then."""
    path = folder / name
    with suppress(OSError):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    for parent in path.parents:
        if parent == folder:
            break
        with suppress(OSError):
            parent.rmdir()


def _difference(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    parts = [f"{name} {value}" if value else f"no {name}" for name, value in before.items() if now.get(name) != value]
    return ", ".join(parts) or "other inputs"


def _completing_first(name: str) -> tuple[bool, str]:
    return name not in _COMPLETING, name


def _foreign_to_unmarked(names: set[str], step: str) -> set[str]:
    """Those of the names in a folder without a mark that are not of this step's result by 0.1.0; all if it is none."""
    completing, patterns = _UNMARKED.get(step, ("", ()))
    if completing not in names:
        return names
    return {name for name in names - {completing} if not any(fnmatchcase(name, pattern) for pattern in patterns)}


def _read_mark(folder: Path) -> _Mark:
    try:
        return _Mark.model_validate_json((folder / MARK).read_bytes())
    except (OSError, ValidationError):
        return _Mark(step="another program")


def _write_mark(folder: Path, mark: _Mark) -> None:
    storage.write_bytes(str(folder / MARK), mark.model_dump_json(indent=1).encode())


def _digest(path: Path) -> str:
    return storage.file_sha256(path) if path.is_file() else ""
