"""Where finished shards are kept: a folder named by their key, here or in object storage.

A shard is its Parquet file and, written after it, its record. Whatever was killed leaves at most files without a
record, which are written anew. Two that write the same shard at once write the same bytes.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from minicpmv_finetune import storage
from minicpmv_finetune.errors import UserError
from minicpmv_finetune.shards.format import damaged_shards

from .shard_tasks import ShardRecord, ShardTask

_SCRATCH = ".writing-"
_ABANDONED_SECONDS = 24 * 3600


@dataclass(frozen=True)
class ShardStore:
    """The finished shards of one key."""

    uri: str

    @property
    def folder(self) -> Path | None:
        """The folder, where it is here."""
        return None if storage.is_object_uri(self.uri) else Path(self.uri)

    def finished(self, tasks: Sequence[ShardTask]) -> dict[str, ShardRecord]:
        """The records of the tasks that are done, by name; a shard that is damaged or missing is not."""
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
            # Reading them all would take as long as using them; whoever does compares the hashes.
            damaged = [shard for shard in shards if sizes.get(shard.file) != shard.bytes]
        lost = {shard.file for shard in damaged}
        return {name: record for name, record in records.items() if record.shard.file not in lost}

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder to write shards in until they are put; gone at the end."""
        if self.folder is None:
            with tempfile.TemporaryDirectory() as temporary:
                yield Path(temporary)
            return
        with suppress(OSError):
            for path in self.folder.glob(f"{_SCRATCH}*"):
                if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                    shutil.rmtree(path, ignore_errors=True)  # of a process that was killed
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = tempfile.mkdtemp(prefix=_SCRATCH, dir=self.folder)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written ({error.strerror}); choose another cache.") from error
        try:
            yield Path(temporary)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def put(self, path: Path, record: ShardRecord) -> None:
        """Move a written shard in, and its record after it."""
        if self.folder:
            path.replace(self.folder / record.shard.file)
        else:
            storage.upload_file(path, self._address(record.shard.file))
            path.unlink()
        name = Path(record.shard.file).stem
        storage.write_bytes(self._address(f"{name}.json"), record.model_dump_json().encode())

    def hand_over(self, folder: Path, records: Sequence[ShardRecord]) -> str:
        """Put the shards into a folder where that costs nothing.

        Returns:
            Where they lie, empty if in the folder.
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
