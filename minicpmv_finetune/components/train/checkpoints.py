"""Checkpoints that survive the pod: sealed when complete, uploaded in the background, found again by a retry.

The Trainer writes `checkpoint-N/` file after file, so a killed process leaves an incomplete checkpoint. A checkpoint
counts only if its seal `checkpoint-N.json`, written last, is beside it and every file has the sha256 in the seal;
otherwise the checkpoint before it is used. The layout is the same in a folder and in an object store.
"""

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
    """`checkpoint-N.json`: the checkpoint is complete, and these are its files."""

    model_config = ConfigDict(frozen=True)

    schema_version: int = SCHEMA_VERSION
    step: int
    world_size: int = Field(description="Number of processes that wrote it; each keeps its own random state.")
    training: str = Field(description="Digest of settings, data and base model; no other training continues from it.")
    files: dict[str, str] = Field(description="sha256 of each file by its path in the checkpoint.")


class Checkpoints:
    """The checkpoints of one training, in a local folder and, if wanted, in an object store."""

    def __init__(self, folder: Path, uri: str, keep: int, training: str, world_size: int) -> None:
        """Describe where the checkpoints are; nothing is read or written yet.

        Args:
            folder: Folder that the Trainer writes to.
            uri: `s3://` folder that receives a copy; empty for none.
            keep: Number of the newest checkpoints that stay in the store.
            training: Digest of the training, see `training_identity`.
            world_size: Number of processes.
        """
        self.folder = folder
        self.uri = uri
        self.keep = keep
        self.training = training
        self.world_size = world_size
        self._uploads = ThreadPoolExecutor(max_workers=1)
        self._upload: Future[None] | None = None

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

    def seal(self, step: int, uploaded: Mapping[str, str] = MappingProxyType({})) -> None:
        """Declare a finished checkpoint complete, and begin to upload it.

        Args:
            step: Step of the checkpoint.
            uploaded: Files that other nodes have uploaded, as `upload_part` returns them.

        Raises:
            RetryableError: The upload before this one failed.
        """
        checkpoint = self.folder / f"checkpoint-{step}"
        files = {**uploaded, **_hashes(checkpoint)}
        seal = Seal(step=step, world_size=self.world_size, training=self.training, files=files)
        storage.write_bytes(str(_seal_path(checkpoint)), seal.model_dump_json(indent=1).encode())
        for stale in self.folder.glob("checkpoint-*.json"):
            if not stale.with_suffix("").is_dir():
                stale.unlink()
        if self.uri:
            # The Trainer keeps the newest two checkpoints, so it does not delete one that is being uploaded.
            self.finish_upload()
            self._upload = self._uploads.submit(self._upload_checkpoint, seal, set(files) - set(uploaded))

    def finish_upload(self) -> None:
        """Wait until every sealed checkpoint is in the store.

        Raises:
            RetryableError: The store does not answer.
        """
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
            if seal.schema_version > SCHEMA_VERSION:
                raise UserError(
                    f"{self.uri or self.folder}/checkpoint-{step}: schema version {seal.schema_version} is newer than "
                    f"this program's {SCHEMA_VERSION}; upgrade minicpmv-finetune, or give another --checkpoint_uri."
                )
            if seal.world_size != self.world_size:
                raise UserError(
                    f"{self.uri or self.folder}/checkpoint-{step}: written by {seal.world_size} processes, but "
                    f"{self.world_size} run now, which would use the samples in another order; start as many "
                    "processes, or give another --checkpoint_uri to train from the beginning."
                )
            if self._is_whole(seal) or self._download(seal):
                return self.folder / f"checkpoint-{step}"
            print(f"checkpoint-{step} is damaged; the checkpoint before it is used.", file=sys.stderr)
        return None

    def delete_local(self) -> None:
        """Delete the local folder, when the training's result is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _steps(self, uri: str) -> set[int]:
        names = storage.list_files(uri) if uri else {}
        return {
            int(name.removeprefix("checkpoint-").removesuffix(".json"))
            for name in names
            if name.startswith("checkpoint-") and name.endswith(".json")
        }

    def _read_seal(self, step: int) -> Seal | None:
        return _read_seal_at(str(self.folder), step) or (_read_seal_at(self.uri, step) if self.uri else None)

    def _is_whole(self, seal: Seal) -> bool:
        checkpoint = self.folder / f"checkpoint-{seal.step}"
        return all(
            (checkpoint / name).is_file() and storage.file_sha256(checkpoint / name) == digest
            for name, digest in seal.files.items()
        )

    def _upload_checkpoint(self, seal: Seal, files: Collection[str]) -> None:
        name = f"checkpoint-{seal.step}"
        for file in files:
            storage.upload_file(self.folder / name / file, f"{self.uri}/{name}/{file}")
        storage.write_bytes(f"{self.uri}/{name}.json", seal.model_dump_json(indent=1).encode())
        for step in sorted(self._steps(self.uri), reverse=True)[self.keep :]:
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


def _seal_path(checkpoint: Path) -> Path:
    return checkpoint.with_name(f"{checkpoint.name}.json")


def _read_seal_at(uri: str, step: int) -> Seal | None:
    """A checkpoint's seal; None if there is none that can be read."""
    try:
        return Seal.model_validate_json(storage.read_bytes(storage.join(uri, f"checkpoint-{step}.json")))
    except (UserError, ValidationError):
        return None


def _hashes(folder: Path) -> dict[str, str]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): storage.file_sha256(path) for path in paths}
