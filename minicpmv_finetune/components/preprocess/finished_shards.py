"""The folder of the finished shards of one key, local or in object storage.

A finished shard consists of its Parquet file and of its record, which is written after the file. A killed process
leaves at most files without a record, which are then written again. Two processes that write the same shard at the
same time write the same bytes. The manifest of the last run and what its report shows of the samples are here too.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from minicpmv_finetune import storage
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.shards.format import MANIFEST_FILE, Manifest, damaged_shards

from .shard_tasks import ShardRecord, ShardTask

_STAGING = ".writing-"
_ABANDONED_SECONDS = 24 * 3600


@dataclass(frozen=True)
class FinishedShards:
    """The finished shards of one key, in the folder `uri`."""

    uri: str

    @property
    def folder(self) -> Path | None:
        """The path of the folder, or None if it is in object storage."""
        return None if storage.is_object_uri(self.uri) else storage.local_path(self.uri)

    def find(self, tasks: Sequence[ShardTask]) -> dict[str, ShardRecord]:
        """The records of the finished tasks, by name; a task whose file is damaged or missing is not finished."""
        sizes = storage.list_files(self.uri)
        records = {
            task.name: ShardRecord.model_validate_json(storage.read_bytes(self._address(f"{task.name}.json")))
            for task in tasks
            if f"{task.name}.json" in sizes
        }
        shards = [record.shard for record in records.values()]
        if self.folder:
            damaged = damaged_shards(self.folder, shards)
        else:
            # Hashing all files would take as long as using them; the train step compares the hashes of its copies.
            damaged = [shard for shard in shards if sizes.get(shard.file) != shard.bytes]
        unusable = {shard.file for shard in damaged}
        return {name: record for name, record in records.items() if record.shard.file not in unusable}

    @contextmanager
    def staging_folder(self) -> Iterator[Path]:
        """A temporary folder for shards that are being written."""
        if self.folder is None:
            with tempfile.TemporaryDirectory() as temporary:
                yield Path(temporary)
            return
        with suppress(OSError):
            for path in self.folder.glob(f"{_STAGING}*"):
                if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                    shutil.rmtree(path, ignore_errors=True)  # left by a killed process
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = tempfile.mkdtemp(prefix=_STAGING, dir=self.folder)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written ({error.strerror}); choose another cache.") from error
        try:
            yield Path(temporary)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def add(self, path: Path, record: ShardRecord) -> None:
        """Move a written shard into the folder, and then write its record."""
        if self.folder:
            path.replace(self.folder / record.shard.file)
        else:
            storage.upload_file(path, self._address(record.shard.file))
            path.unlink()
        self.write(f"{Path(record.shard.file).stem}.json", record.model_dump_json().encode())

    def manifest(self) -> Manifest | None:
        """The manifest of an earlier run; None if no run has finished here."""
        with suppress(ValidationError):
            return Manifest.model_validate_json(self.read(MANIFEST_FILE))
        return None

    def read(self, name: str) -> bytes:
        """The content of a file; empty if there is none."""
        return storage.read_bytes(self._address(name)) if name in storage.list_files(self.uri) else b""

    def write(self, name: str, content: bytes) -> None:
        """Write a small file."""
        storage.write_bytes(self._address(name), content)

    def link_into(self, folder: Path, records: Sequence[ShardRecord]) -> str:
        """Link local shards into a folder; shards in object storage stay where they are.

        Returns:
            URI of the folder of the shards; empty if they are in `folder`.
        """
        if self.folder is None:
            return self.uri
        for record in records:
            source, target = self.folder / record.shard.file, folder / record.shard.file
            try:
                os.link(source, target)
            except OSError:
                shutil.copyfile(source, target)
        return ""

    def _address(self, name: str) -> str:
        return storage.join(self.uri, name)
