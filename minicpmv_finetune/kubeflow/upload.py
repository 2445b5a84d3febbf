"""Copy data files and the images that they name into the object store, for a run on a cluster.

Everything goes below a folder whose name is a digest of the content, as relative paths like those on this machine:
equal data has an equal address, a repeated command sends only what is missing, and a run never sees half of a change.
The data files come last, so that a folder with them is complete.

Only what lies in the folder of the data files is copied: a data file is often somebody else's, and must not be able to
publish other files of this machine.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minicpmv_finetune import storage
from minicpmv_finetune.data import image_files
from minicpmv_finetune.data.reading import Record, read_records
from minicpmv_finetune.errors import MistakesError, RetryableError, UserError
from minicpmv_finetune.inputs.checks import check_data
from minicpmv_finetune.options import raise_mistakes
from minicpmv_finetune.progress import progress

from .profile import Profile
from .store import pipeline_root

FOLDER = "minicpmv-data"
_OUTSIDE = "outside"  # folder of the images that lie outside of the data's folder
_SHOWN = 3  # examples in a message


@dataclass(frozen=True)
class Upload:
    """What `upload` did, or would do.

    Attributes:
        uris: Address of each data file in the store, in the given order.
        files: Number of data files, images and archives.
        sent: Number of those that were not in the store yet.
        bytes: Size of the sent files.
        missing: Number of images that the data names and that do not exist; validate-data rejects their samples.
        elsewhere: Number of images that stay where they are, because the data names them by a URI.
    """

    uris: tuple[str, ...]
    files: int
    sent: int
    bytes: int
    missing: int
    elsewhere: int


@dataclass(frozen=True)
class _Source:
    """A file to copy: its content's digest, and its size and time when that was computed."""

    path: Path
    sha256: str
    state: tuple[int, int]


class _Names:
    """The images that data files name, and the names under which they are copied.

    Attributes:
        files: Path of each file by its name in the store.
        missing: Images that do not exist.
        outside: Images outside of the data's folder.
        elsewhere: Images at a URI, which stay there.
    """

    def __init__(self, folder: Path, outside_allowed: bool) -> None:
        self._folder = folder
        self._real_folder = folder.resolve()
        self._outside_allowed = outside_allowed
        self.files: dict[str, Path] = {}
        self.missing: dict[str, None] = {}
        self.outside: dict[str, None] = {}
        self.elsewhere: set[str] = set()

    def add(self, reference: str, folder: Path) -> str:
        """Note an image; returns the reference under which the copied data file must name it."""
        if image_files.is_data_uri(reference):
            return reference
        if "://" in reference:
            self.elsewhere.add(reference)
            return reference
        try:
            address = image_files.resolve(reference, str(folder))
        except UserError:
            return reference  # validate-data rejects the sample, with this sentence
        archive = image_files.archive_of(address)
        path = Path(os.path.normpath(archive or address))
        try:
            exists = path.is_file()
        except (OSError, ValueError):
            exists = False
        if not exists:
            self.missing[reference] = None
            return reference
        name = self._name(path)
        if name is None:
            self.outside[reference] = None
            return reference
        self.files[name] = path
        is_same = not Path(reference).is_absolute() and not name.startswith(f"{_OUTSIDE}/")
        return (
            reference if is_same else f"{_up(folder, self._folder)}{name}{address[len(archive) :] if archive else ''}"
        )

    def _name(self, path: Path) -> str | None:
        """The name of a file in the store; None if it lies outside of the data's folder and must not be copied."""
        is_inside = path.is_relative_to(self._folder)
        if not self._outside_allowed and not (is_inside and path.resolve().is_relative_to(self._real_folder)):
            return None
        if is_inside:
            return path.relative_to(self._folder).as_posix()
        return f"{_OUTSIDE}/{hashlib.sha256(str(path).encode()).hexdigest()[:8]}-{path.name}"


def _up(folder: Path, base: Path) -> str:
    """The relative path from a folder back to the base."""
    return "../" * len(folder.relative_to(base).parts)


def upload(
    data: Sequence[Path],
    profile: Profile,
    destination: str = "",
    outside_allowed: bool = False,
    dry_run: bool = False,
) -> Upload:
    """Copy data files and their images into the object store that the environment names; see `use_store`.

    Args:
        data: Data files on this machine.
        profile: Settings of the cluster.
        destination: Folder in the store; empty means the folder `minicpmv-data` below the runs' pipeline root.
        outside_allowed: Whether images outside of the data files' folder are copied too.
        dry_run: Whether only to find out what would be sent.

    Raises:
        UserError: A file cannot be read, an image lies outside of the folder, or access is denied.
        RetryableError: The store does not answer, or a file was changed meanwhile.
    """
    files = [Path(os.path.abspath(path.expanduser())) for path in data]  # noqa: PTH100 - links stay as they are
    absent = [path for path in files if not path.is_file()]
    raise_mistakes([f"{path}: {_no_file(path)}; give data files of this machine." for path in absent])
    for path in files:
        check_data(str(path))
    folder = Path(os.path.commonpath([path.parent for path in files]))
    place = _destination(destination, profile)
    names = _Names(folder, outside_allowed)
    with tempfile.TemporaryDirectory(prefix="upload-") as scratch:
        copied = {
            path.relative_to(folder).as_posix(): _with_true_references(path, names, Path(scratch) / f"{number}.jsonl")
            for number, path in enumerate(files)
        }
        _refuse(names, folder)
        sources = _read_all({**names.files, **copied})
        parts = json.dumps(sorted((name, source.sha256) for name, source in sources.items()))
        target = storage.join(place, hashlib.sha256(parts.encode()).hexdigest()[:16])
        sent = _send(target, sources, tuple(copied), dry_run)
    return Upload(
        uris=tuple(storage.join(target, name) for name in copied),
        files=len(sources),
        sent=len(sent),
        bytes=sum(source.state[0] for source in sent),
        missing=len(names.missing),
        elsewhere=len(names.elsewhere),
    )


def describe_upload(done: Upload, dry_run: bool = False) -> str:
    """What was sent, and what was not, in a line or a few."""
    would = "would be " if dry_run else ""
    lines = [f"{done.sent:,} of {done.files:,} files {would}sent ({done.bytes / 1e6:,.1f} MB), the others are there"]
    if done.elsewhere:
        stay = "stay where they are" if done.elsewhere > 1 else "stays where it is"
        lines.append(f"images named by a URI: {done.elsewhere:,} {stay}")
    if done.missing:
        does = "images do" if done.missing > 1 else "image does"
        lines.append(f"warning: {done.missing:,} {does} not exist; validate-data rejects the samples that name them")
    return "\n".join(lines)


def _no_file(path: Path) -> str:
    return "is a folder" if path.is_dir() else "not found"


def _destination(given: str, profile: Profile) -> str:
    """The folder in the store that receives the digest's folder.

    Raises:
        UserError: It is no place in a store, or one that the profile's steps may not read.
    """
    if given and not storage.is_object_uri(given):
        raise UserError(f"--to {given}: is no place in an object store; write s3://bucket/folder.")
    target = given.rstrip("/") or storage.join(pipeline_root(profile), FOLDER)
    allowed = profile.allowed_uris
    if allowed and not any(f"{target}/".startswith(f"{place.rstrip('/')}/") for place in allowed):
        raise UserError(
            f"{target}: the profile's allowed_uris ({', '.join(allowed)}) do not let a run read there; give --to with "
            "a folder in one of them."
        )
    return target


def _with_true_references(path: Path, names: _Names, copy: Path) -> Path:
    """Note the images of a data file; returns it, or a copy with other paths if some are not true in the store.

    Raises:
        UserError: The file is no data file, or a copy is needed and cannot be made because of invalid JSON.
    """

    def renamed(record: Record) -> Any:
        return _renamed(record.content, lambda reference: names.add(reference, path.parent))

    if not sum(renamed(record) is not record.content for record in read_records(str(path), path)):
        return path
    with copy.open("w", encoding="utf-8") as lines:
        for record in read_records(str(path), path):
            if record.problem:
                raise UserError(
                    f"{path}: {record.problem} Its paths of images must be replaced by others, which needs valid JSON."
                )
            lines.write(f"{json.dumps(renamed(record))}\n")
    return copy


def _renamed(content: Any, rename: Callable[[str], str]) -> Any:
    """An item with its images renamed; the same object if nothing changes."""
    image = content.get("image") if isinstance(content, dict) else None
    renamed = image
    if isinstance(image, str):
        renamed = rename(image)
    elif isinstance(image, list):
        renamed = [rename(one) if isinstance(one, str) else one for one in image]
    elif isinstance(image, dict):
        renamed = {key: rename(one) if isinstance(one, str) else one for key, one in image.items()}
    return content if renamed == image else {**content, "image": renamed}


def _refuse(names: _Names, folder: Path) -> None:
    """Refuse images that must not be copied, and data of which no image exists.

    Raises:
        MistakesError: As the text says.
    """
    mistakes = []
    if names.outside:
        mistakes.append(
            f"{len(names.outside):,} images lie outside of {folder}, such as {_examples(names.outside)}; move them "
            "there, or give --outside to copy them too."
        )
    if names.missing and not names.files and not names.outside and not names.elsewhere:
        mistakes.append(
            f"none of the {len(names.missing):,} images exists, such as {_examples(names.missing)}; relative paths "
            "start at the data file's folder."
        )
    if mistakes:
        raise MistakesError(mistakes)


def _examples(references: dict[str, None]) -> str:
    return ", ".join(list(references)[:_SHOWN])


def _read_all(files: dict[str, Path]) -> dict[str, _Source]:
    """Read every file once, several at a time."""

    def read(path: Path) -> _Source:
        state = _state(path)
        try:
            return _Source(path, storage.file_sha256(path), state)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); check who owns it.") from error

    with ThreadPoolExecutor(storage.FILES_AT_ONCE) as pool:
        found = _shown(pool.map(read, files.values()), "reading", len(files))
        return dict(zip(files, found, strict=True))


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _send(target: str, sources: dict[str, _Source], last: tuple[str, ...], dry_run: bool) -> list[_Source]:
    """Send the files that the store lacks, those of `last` at the end; returns them."""
    stored = {name: file.bytes for name, file in storage.walk(target).items()}
    missing = [name for name in sources if stored.get(name) != sources[name].state[0]]
    if dry_run:
        return [sources[name] for name in missing]
    first = [name for name in missing if name not in last]
    with ThreadPoolExecutor(storage.FILES_AT_ONCE) as pool:
        for _ in _shown(pool.map(lambda name: _send_file(target, name, sources[name]), first), "uploading", len(first)):
            pass
    for name in last:
        if name in missing:
            _send_file(target, name, sources[name])
    return [sources[name] for name in missing]


def _send_file(target: str, name: str, source: _Source) -> None:
    """Send a file, and make sure that it is still the one whose digest is in the folder's name.

    Raises:
        RetryableError: The file was changed after it was read.
    """
    uri = storage.join(target, name)
    storage.upload_file(source.path, uri)
    if _state(source.path) != source.state:
        storage.remove_file(uri)
        raise RetryableError(f"{source.path}: was changed while it was uploaded; try again when nobody writes there.")


def _shown(items: Iterator[Any], description: str, total: int) -> Iterator[Any]:
    """The items, with progress shown."""
    with progress(description, total, "files") as bar:
        for item in items:
            yield item
            bar.update()
