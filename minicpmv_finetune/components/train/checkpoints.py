"""Checkpoints that survive the pod: sealed when complete, uploaded in the background, found again by a retry.

The Trainer writes `checkpoint-N/` file after file, so a killed process leaves a part of one. A checkpoint counts only
when its seal `checkpoint-N.json`, written last, lies beside it and every file has the sha256 that the seal names;
otherwise the one before is taken. The same layout serves a folder and an object store.
"""

import hashlib
import shutil
import sys
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from minicpmv_finetune import storage
from minicpmv_finetune.errors import UserError

SCHEMA_VERSION = 1


class Seal(BaseModel):
    """`checkpoint-N.json`: the checkpoint is complete, and this is what it holds."""

    model_config = ConfigDict(frozen=True)

    schema_version: int = SCHEMA_VERSION
    step: int
    world_size: int = Field(description="number of processes that wrote it; each keeps its own random state")
    training: str = Field(description="digest of what is trained on what, so that no other training is continued")
    files: dict[str, str] = Field(description="sha256 of each file by its path in the checkpoint")


class Checkpoints:
    """The checkpoints of one training, in a local folder and, when asked for, in an object store."""

    def __init__(self, folder: Path, uri: str, keep: int, training: str, world_size: int) -> None:
        """Nothing is read or written yet.

        Args:
            folder: where the Trainer writes.
            uri: `s3://` folder that receives a copy, or empty.
            keep: how many of the newest stay in the store.
            training: digest of what is trained on what.
            world_size: number of processes.
        """
        self.folder = folder
        self.uri = uri
        self.keep = keep
        self.training = training
        self.world_size = world_size
        self._uploads = ThreadPoolExecutor(max_workers=1)
        self._upload: Future[None] | None = None

    def upload_part(self, step: int) -> dict[str, str]:
        """Upload what this node's processes wrote of a checkpoint that another node will seal, and forget it here.

        Returns:
            The sha256 of each file by its path in the checkpoint; nothing where the nodes share a folder.

        Raises:
            RetryableError: the store does not answer.
        """
        if not self.uri:
            return {}
        checkpoint = self.folder / f"checkpoint-{step}"
        files = _hashes(checkpoint)
        for file in files:
            storage.upload_file(checkpoint / file, f"{self.uri}/{checkpoint.name}/{file}")
        shutil.rmtree(checkpoint, ignore_errors=True)
        return files

    def seal(self, step: int, elsewhere: Mapping[str, str] = MappingProxyType({})) -> None:
        """Declare a finished checkpoint complete, and begin to upload it.

        Args:
            step: of the checkpoint.
            elsewhere: files that other nodes have uploaded, as `upload_part` tells.

        Raises:
            RetryableError: the upload before this one failed.
        """
        checkpoint = self.folder / f"checkpoint-{step}"
        files = {**elsewhere, **_hashes(checkpoint)}
        seal = Seal(step=step, world_size=self.world_size, training=self.training, files=files)
        storage.write_bytes(str(_seal_path(checkpoint)), seal.model_dump_json(indent=1).encode())
        for stale in self.folder.glob("checkpoint-*.json"):
            if not stale.with_suffix("").is_dir():
                stale.unlink()
        if self.uri:
            # The Trainer keeps the newest two, so what is being uploaded is not deleted underneath.
            self.finish_upload()
            self._upload = self._uploads.submit(self._upload_checkpoint, seal, set(files) - set(elsewhere))

    def finish_upload(self) -> None:
        """Wait until the store holds what was sealed.

        Raises:
            RetryableError: it does not answer.
        """
        if self._upload is not None:
            self._upload.result()
            self._upload = None

    def newest(self) -> Path | None:
        """The newest complete checkpoint of this training, in the local folder.

        Raises:
            UserError: it was written by another number of processes, or by a newer program.
            RetryableError: the store does not answer.
        """
        for step in sorted(self._steps(str(self.folder)) | self._steps(self.uri), reverse=True):
            seal = self._read_seal(step)
            if seal is None or seal.training != self.training:
                continue
            if seal.schema_version > SCHEMA_VERSION:
                raise UserError(
                    f"{self.uri or self.folder}/checkpoint-{step}: schema version {seal.schema_version} is newer than "
                    f"this program's {SCHEMA_VERSION}; upgrade minicpmv-finetune, or give another --checkpoint_uri."
                )
            if seal.world_size != self.world_size:
                raise UserError(
                    f"{self.uri or self.folder}/checkpoint-{step}: written by {seal.world_size} processes, but "
                    f"{self.world_size} run now, which would see the samples in another order; run as many, or give "
                    "another --checkpoint_uri to start anew."
                )
            if self._is_whole(seal) or self._download(seal):
                return self.folder / f"checkpoint-{step}"
            print(f"checkpoint-{step} is damaged; the one before it is tried.", file=sys.stderr)
        return None

    def discard_local(self) -> None:
        """Remove the local folder, once the training's result is in place."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _steps(self, uri: str) -> set[int]:
        names = storage.list_files(uri) if uri else {}
        return {
            int(name.removeprefix("checkpoint-").removesuffix(".json"))
            for name in names
            if name.startswith("checkpoint-") and name.endswith(".json")
        }

    def _read_seal(self, step: int) -> Seal | None:
        for place in filter(None, (str(self.folder), self.uri)):
            try:
                return Seal.model_validate_json(storage.read_bytes(storage.join(place, f"checkpoint-{step}.json")))
            except (UserError, ValidationError):
                continue
        return None

    def _is_whole(self, seal: Seal) -> bool:
        checkpoint = self.folder / f"checkpoint-{seal.step}"
        return all(
            (checkpoint / name).is_file() and _sha256(checkpoint / name) == digest
            for name, digest in seal.files.items()
        )

    def _upload_checkpoint(self, seal: Seal, files: Collection[str]) -> None:
        name = f"checkpoint-{seal.step}"
        for file in files:
            storage.upload_file(self.folder / name / file, f"{self.uri}/{name}/{file}")
        storage.write_bytes(f"{self.uri}/{name}.json", seal.model_dump_json(indent=1).encode())
        for step in sorted(self._steps(self.uri), reverse=True)[self.keep :]:
            # The seal goes first: without it what is left of the files does not count.
            old = self._read_remote_seal(step)
            storage.remove_file(f"{self.uri}/checkpoint-{step}.json")
            for file in old.files if old else ():
                storage.remove_file(f"{self.uri}/checkpoint-{step}/{file}")

    def _read_remote_seal(self, step: int) -> Seal | None:
        try:
            return Seal.model_validate_json(storage.read_bytes(f"{self.uri}/checkpoint-{step}.json"))
        except (UserError, ValidationError):
            return None

    def _download(self, seal: Seal) -> bool:
        """Fetch a checkpoint from the store; False when there is none or it is damaged."""
        if not self.uri:
            return False
        name = f"checkpoint-{seal.step}"
        try:
            with storage.staged_folder(self.folder / name) as staging:
                for file, digest in seal.files.items():
                    target = staging / file
                    target.parent.mkdir(parents=True, exist_ok=True)
                    storage.download_file(f"{self.uri}/{name}/{file}", target)
                    if _sha256(target) != digest:
                        raise UserError(f"{self.uri}/{name}/{file}: differs from its seal.")
        except UserError:
            return False
        storage.write_bytes(str(_seal_path(self.folder / name)), seal.model_dump_json(indent=1).encode())
        return True


def _seal_path(checkpoint: Path) -> Path:
    return checkpoint.with_name(f"{checkpoint.name}.json")


def _hashes(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): _sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
