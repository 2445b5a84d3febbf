"""Checkpoints that survive the pod: sealed and uploaded in the background, found again by a retry.

The Trainer writes `checkpoint-N/` file after file, so a killed process leaves an incomplete checkpoint. A checkpoint
counts only if its seal `checkpoint-N.json`, written last, is beside it and every file has the sha256 in the seal;
otherwise the checkpoint before it is used. The layout is the same in a folder and in an object store.
"""

import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from minicpmv_finetune import storage
from minicpmv_finetune.cores import cores
from minicpmv_finetune.errors import RetryableError, UserError
from minicpmv_finetune.outputs import check_workspace, claim_workspace, release_workspace, work_folder
from minicpmv_finetune.terminal import print_sentence

from .checkpoint_place import Lease

SCHEMA_VERSION = 1
_SEAL_NAME = re.compile(r"checkpoint-(\d+)\.json")
_OWN_NAMES = re.compile(r"checkpoint-\d+|\.checkpoint-\d+\..*")
"""Folders of checkpoints, and the staging folders and files that a killed process left."""
_STEP = "train, for its checkpoints,"
_KNOWN_BY = ("checkpoint-[0-9]*.json",)
_MAX_READERS = 8  # files whose sha256 is computed at the same time


class Seal(BaseModel):
    """`checkpoint-N.json`: the checkpoint is complete, and these are its files."""

    model_config = ConfigDict(frozen=True)

    schema_version: int = SCHEMA_VERSION
    step: int
    world_size: int = Field(description="Number of processes that wrote it; each keeps its own random state.")
    training: str = Field(description="Digest of settings, data and base model; no other training continues from it.")
    files: dict[str, str] = Field(description="sha256 of each file by its path in the checkpoint.")


class Checkpoints:
    """The checkpoints of one training, in a local folder and, if wanted, in an object store."""

    def __init__(
        self,
        folder: Path,
        uri: str,
        keep: int,
        training: str,
        world_size: int,
        keep_local: int | None = None,
        lease: Lease | None = None,
    ) -> None:
        """Describe where the checkpoints are; nothing is read or written yet.

        Args:
            folder: Folder that the Trainer writes to.
            uri: `s3://` folder that receives a copy; empty for none.
            keep: Number of this training's newest checkpoints that stay in the store.
            keep_local: Number of them that stay in the folder; by default all.
            training: Digest of the training, see `training_identity`.
            world_size: Number of processes.
            lease: The right to write to `uri`, where other runs may want to write too.
        """
        self.lease = lease
        self.folder = folder
        self.uri = uri
        self.keep = keep
        self.keep_local = keep_local
        self.training = training
        self.world_size = world_size
        self._seals = ThreadPoolExecutor(max_workers=1)
        self._sealing: Future[None] | None = None
        self._uploads = ThreadPoolExecutor(max_workers=1)
        self._upload: Future[None] | None = None

    @contextmanager
    def written_by_this_run(self) -> Iterator[None]:
        """Give the lease back when the block ends, and note whether the training in it is finished."""
        is_finished = False
        try:
            yield
            is_finished = True
        except Exception:
            # The last checkpoint shall count. Why the training failed matters more than an upload that failed too.
            with suppress(RetryableError, UserError, OSError):
                self.finish_upload()
            raise
        finally:
            if self.lease:
                self.lease.release(is_finished)

    def upload_part(self, step: int) -> dict[str, str]:
        """Upload this node's files of a checkpoint that another node will seal, and delete them here.

        Returns:
            sha256 of each file by its path in the checkpoint; nothing if the nodes share a folder.

        Raises:
            RetryableError: The store does not answer.
        """
        if not self.uri:
            return {}
        checkpoint = self.folder / f"checkpoint-{step}"
        files = _hashes(checkpoint)
        for file in files:
            storage.upload_file(checkpoint / file, f"{self.uri}/{checkpoint.name}/{file}")
        shutil.rmtree(checkpoint, ignore_errors=True)
        return files

    def begin_sealing(self, step: int, uploaded: Mapping[str, str], best: str | None) -> None:
        """Let `seal` run while training goes on: the sha256 of a large checkpoint takes minutes.

        Raises:
            RetryableError: The upload before this one failed.
        """
        self.finish_upload()
        self._sealing = self._seals.submit(self.seal, step, uploaded, best)

    def _finish_sealing(self) -> None:
        if self._sealing is not None:
            sealing, self._sealing = self._sealing, None
            sealing.result()

    def seal(self, step: int, uploaded: Mapping[str, str] = MappingProxyType({}), best: str | None = None) -> None:
        """Declare a finished checkpoint complete, begin to upload it, and delete this training's older ones.

        Args:
            step: Step of the checkpoint.
            uploaded: Files that other nodes have uploaded, as `upload_part` returns them.
            best: Folder of the checkpoint that the training may return to, which is not deleted.

        Raises:
            RetryableError: The upload before this one failed.
        """
        checkpoint = self.folder / f"checkpoint-{step}"
        files = {**uploaded, **_hashes(checkpoint)}
        seal = Seal(step=step, world_size=self.world_size, training=self.training, files=files)
        storage.write_bytes(str(_seal_path(checkpoint)), seal.model_dump_json(indent=1).encode())
        for other in self._steps(str(self.folder)):
            if not (self.folder / f"checkpoint-{other}").is_dir():
                _seal_path(self.folder / f"checkpoint-{other}").unlink()
        self._finish_upload()
        others = [old for old in self._own_steps(str(self.folder)) if old != step]
        for old in others[self.keep_local - 1 :] if self.keep_local else ():
            if f"checkpoint-{old}" != Path(best or "").name:
                _seal_path(self.folder / f"checkpoint-{old}").unlink()
                shutil.rmtree(self.folder / f"checkpoint-{old}", ignore_errors=True)
        if self.uri:
            self._upload = self._uploads.submit(self._upload_checkpoint, seal, set(files) - set(uploaded))

    def finish_upload(self) -> None:
        """Wait until every checkpoint is sealed and in the store.

        Raises:
            RetryableError: The store does not answer.
        """
        self._finish_sealing()
        self._finish_upload()

    def _finish_upload(self) -> None:
        if self._upload is not None:
            self._upload.result()
            self._upload = None

    def newest(self) -> Path | None:
        """Find this training's newest complete checkpoint, and download it if it is only in the store.

        Raises:
            UserError: The checkpoint was written by another number of processes, or by a newer program.
            RetryableError: The store does not answer.
        """
        for step in sorted(self._steps(str(self.folder)) | self._steps(self.uri), reverse=True):
            seal = self._read_seal(step)
            if seal is None or seal.training != self.training:
                continue
            place = f"{self.uri or self.folder}/checkpoint-{step}"
            self._require_readable(seal, place)
            self._require_world_size(seal, place)
            if self._is_whole(seal) or self._download(seal):
                return self.folder / f"checkpoint-{step}"
            print_sentence(f"checkpoint-{step} is damaged; the checkpoint before it is used.")
        return None

    def named(self, address: str) -> Path:
        """Check a checkpoint that the user named as `newest` checks those that it finds.

        Raises:
            UserError: The checkpoint is incomplete or damaged, or belongs to another training, number of processes or
                newer program.
        """
        place = f"--resume_from_checkpoint {address}"
        checkpoint, seal = _named_folder(address), seal_of(address, place)
        self._require_readable(seal, place)
        if seal.training != self.training:
            raise UserError(
                f"{place}: belongs to a training with another base model, other data or other flags; give the flags "
                "of that training, or leave the flag out to train from the beginning."
            )
        self._require_world_size(seal, place)
        if not _has_files(checkpoint, seal):
            raise UserError(
                f"{place}: a file is missing or differs from {checkpoint.name}.json, so the checkpoint is damaged; "
                "leave the flag out to resume from the newest complete checkpoint."
            )
        return checkpoint

    def _require_readable(self, seal: Seal, place: str) -> None:
        if seal.schema_version > SCHEMA_VERSION:
            raise UserError(
                f"{place}: schema version {seal.schema_version} is newer than this program's {SCHEMA_VERSION}; upgrade "
                "minicpmv-finetune, or give another --checkpoint_uri."
            )

    def _require_world_size(self, seal: Seal, place: str) -> None:
        if seal.world_size != self.world_size:
            raise UserError(
                f"{place}: written by {seal.world_size} processes, but {self.world_size} run now, which would use the "
                "samples in another order; start as many processes, or give another --checkpoint_uri to train from "
                "the beginning."
            )

    def places_of_others(self) -> list[str]:
        """The places, among folder and store, that have checkpoints of another training."""
        places = [place for place in (str(self.folder), self.uri) if place]
        return [place for place in places if len(self._steps(place)) > len(self._own_steps(place))]

    def addresses(self) -> list[str]:
        """Where this training's newest checkpoints are, in the local folder or else in the store, the oldest first."""
        stored = self._own_steps(self.uri) if self.uri else []
        places = dict.fromkeys(stored, self.uri) | dict.fromkeys(self._own_steps(str(self.folder)), str(self.folder))
        return [storage.join(places[step], f"checkpoint-{step}") for step in sorted(places)[-self.keep :]]

    def delete_local(self) -> None:
        """Delete this training's local checkpoints and incomplete ones, when its result is complete.

        The folder stays if it has checkpoints of another training, or something that a user put there.
        """
        for step in self._own_steps(str(self.folder)):
            _seal_path(self.folder / f"checkpoint-{step}").unlink()
        for path in self.folder.glob("*"):
            if not _OWN_NAMES.fullmatch(path.name) or _seal_path(path).exists():
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
        release_workspace(self.folder)

    def _steps(self, uri: str) -> set[int]:
        names = storage.list_files(uri) if uri else {}
        return {int(found[1]) for name in names if (found := _SEAL_NAME.fullmatch(name))}

    def _own_steps(self, uri: str) -> list[int]:
        """The steps of this training's sealed checkpoints, the newest first; those of others are left alone."""
        seals = {step: _read_seal_at(uri, step) for step in self._steps(uri)}
        own = [step for step, seal in seals.items() if seal is not None and seal.training == self.training]
        return sorted(own, reverse=True)

    def _read_seal(self, step: int) -> Seal | None:
        return _read_seal_at(str(self.folder), step) or (_read_seal_at(self.uri, step) if self.uri else None)

    def _is_whole(self, seal: Seal) -> bool:
        return _has_files(self.folder / f"checkpoint-{seal.step}", seal)

    def _upload_checkpoint(self, seal: Seal, files: Collection[str]) -> None:
        name = f"checkpoint-{seal.step}"
        if self.lease and not self.lease.is_held():
            print_sentence(
                f"{name} is not uploaded: this run was out of reach, and another one writes to {self.uri} now.",
            )
            return
        for file in files:
            storage.upload_file(self.folder / name / file, f"{self.uri}/{name}/{file}")
        storage.write_bytes(f"{self.uri}/{name}.json", seal.model_dump_json(indent=1).encode())
        for step in self._own_steps(self.uri)[self.keep :]:
            # The seal is deleted first: without it the remaining files do not count.
            old = _read_seal_at(self.uri, step)
            storage.remove_file(f"{self.uri}/checkpoint-{step}.json")
            for file in old.files if old else ():
                storage.remove_file(f"{self.uri}/checkpoint-{step}/{file}")

    def _download(self, seal: Seal) -> bool:
        """Download a checkpoint from the store; False if there is none, or it is damaged."""
        if not self.uri:
            return False
        name = f"checkpoint-{seal.step}"
        try:
            with storage.staged_folder(self.folder / name) as staging:
                for file, digest in seal.files.items():
                    target = staging / file
                    target.parent.mkdir(parents=True, exist_ok=True)
                    if storage.download_file(f"{self.uri}/{name}/{file}", target) != digest:
                        raise UserError(f"{self.uri}/{name}/{file}: its content differs from its seal.")
        except UserError:
            return False
        storage.write_bytes(str(_seal_path(self.folder / name)), seal.model_dump_json(indent=1).encode())
        return True


def local_folder(checkpoint_uri: str, out: Path) -> Path:
    """The folder that the Trainer writes checkpoints to.

    Args:
        checkpoint_uri: Value of the flag.
        out: The training's output folder.
    """
    is_given = checkpoint_uri and not storage.is_object_uri(checkpoint_uri)
    return storage.real_path(checkpoint_uri) if is_given else work_folder(out, "checkpoints")


def check_local_folder(folder: Path, out: Path, inputs: Mapping[str, str]) -> None:
    """Refuse a folder of checkpoints that may not be written, before any work; see `check_workspace`.

    Args:
        folder: The folder.
        out: The training's output folder.
        inputs: Paths and URIs that the training reads, by the names of their flags.

    Raises:
        UserError: The folder overlaps the output folder, or as `check_workspace`.
    """
    check_workspace(folder, _STEP, _inputs_beside(folder, out, inputs), known_by=_KNOWN_BY)


def claim_local_folder(folder: Path, out: Path, inputs: Mapping[str, str]) -> None:
    """Claim a folder of checkpoints; arguments and errors are those of `check_local_folder`."""
    claim_workspace(folder, _STEP, _inputs_beside(folder, out, inputs), known_by=_KNOWN_BY)


def _inputs_beside(folder: Path, out: Path, inputs: Mapping[str, str]) -> dict[str, str]:
    """What a folder of checkpoints must not overlap beside the output; a training may resume from what is in it."""
    overlaps = out == folder or out in folder.parents or folder in out.parents
    if overlaps and folder != work_folder(out, "checkpoints"):
        raise UserError(f"{folder}: is, contains or lies in --output_dir ({out}); give another --checkpoint_uri.")
    return {**inputs, "--resume_from_checkpoint": ""}


def seal_of(address: str, place: str) -> Seal:
    """The seal of a checkpoint that the user named.

    Args:
        address: Path of the checkpoint's folder.
        place: What the error message begins with.

    Raises:
        UserError: There is no such folder, or no seal beside it.
    """
    checkpoint = _named_folder(address)
    if not checkpoint.is_dir():
        raise UserError(
            f"{place}: there is no such local folder; leave the flag out to resume from the newest checkpoint."
        )
    number = checkpoint.name.removeprefix("checkpoint-")
    seal = _read_seal_at(str(checkpoint.parent), int(number)) if number.isdigit() else None
    if seal is None:
        raise UserError(
            f"{place}: not a complete checkpoint of a training, because {checkpoint.name}.json is not beside it; give "
            "a checkpoint-N folder with its checkpoint-N.json, or continue a finished adapter by --lora_weight_path."
        )
    return seal


def _named_folder(address: str) -> Path:
    return Path(address).resolve() if "://" in address else storage.real_path(address)


def _seal_path(checkpoint: Path) -> Path:
    return checkpoint.with_name(f"{checkpoint.name}.json")


def _read_seal_at(uri: str, step: int) -> Seal | None:
    """A checkpoint's seal; None if there is none that can be read."""
    try:
        return Seal.model_validate_json(storage.read_bytes(storage.join(uri, f"checkpoint-{step}.json")))
    except (UserError, ValidationError):
        return None


def _has_files(checkpoint: Path, seal: Seal) -> bool:
    """Whether a checkpoint has every file of its seal, unchanged."""
    paths = [checkpoint / name for name in seal.files]
    return all(path.is_file() for path in paths) and _sha256_of_all(paths) == list(seal.files.values())


def _hashes(folder: Path) -> dict[str, str]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return dict(zip((path.relative_to(folder).as_posix() for path in paths), _sha256_of_all(paths), strict=True))


def _sha256_of_all(paths: Sequence[Path]) -> list[str]:
    """The sha256 of files, several at a time: one core computes it more slowly than a disk reads."""
    with ThreadPoolExecutor(min(_MAX_READERS, cores())) as readers:
        return list(readers.map(storage.file_sha256, paths))
