import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import pytest
from botocore.client import BaseClient
from huggingface_hub.errors import LocalEntryNotFoundError

from minicpmv_finetune import environment, storage
from minicpmv_finetune.errors import AccessError, RetryableError, UserError
from minicpmv_finetune.storage import s3
from minicpmv_finetune.storage.failures import explain_failures

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("reference", "relative_to", "expected"),
    [
        ("a.png", "/data", "/data/a.png"),
        ("/elsewhere/a.png", "/data", "/elsewhere/a.png"),
        ("s3://bucket/a.png", "/data", "s3://bucket/a.png"),
        ("a.png", "s3://bucket/set", "s3://bucket/set/a.png"),
        ("../pictures/a.png", "s3://bucket/set", "s3://bucket/pictures/a.png"),
        ("a.png", "s3://bucket", "s3://bucket/a.png"),
        ("/elsewhere/a.png", "s3://bucket/set", "/elsewhere/a.png"),
        ("a.png", "minio://bucket/set", "minio://bucket/set/a.png"),
    ],
)
def test_a_reference_is_resolved_against_its_file(reference: str, relative_to: str, expected: str) -> None:
    assert storage.resolve(reference, relative_to) == expected


@pytest.mark.parametrize("uri", ["s3://bucket/set/train.json", "/data/set/train.json"])
def test_parent_and_join_are_inverse(uri: str) -> None:
    assert storage.join(storage.parent(uri), "train.json") == uri


def test_local_bytes_round_trip_and_leave_nothing_else(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "new" / "file"), b"content")
    assert storage.read_bytes(str(tmp_path / "new" / "file")) == b"content"
    assert files(tmp_path) == {"new/file": b"content"}


@pytest.mark.parametrize(
    ("uri", "sentence"),
    [
        ("missing.json", "not found"),
        (".", "is a folder"),
        ("file/below", "is a file, not a folder"),
        ("x" * 256, "longer than a path can be"),
        ("x/" * 2100, "longer than a path can be"),
        ("half\udce9.json", "not UTF-8 text"),
        ("link", "is a symbolic link to moved away, where nothing is"),
        ("null\0character", "null character"),
        ("https://example.org/a.png", "web addresses are refused"),
        ("HTTP://example.org/a.png", "web addresses are refused"),
        ("gs://bucket/a.png", "only local paths, s3://"),
    ],
)
def test_a_local_mistake_is_explained(uri: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("moved away")
    with pytest.raises(UserError, match=sentence) as raised:
        storage.read_bytes(uri)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize("folder", ["{tmp}/link", "data", "./data/", "{tmp}/data/"])
def test_an_allowed_folder_may_be_relative_or_a_link(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to("data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(environment.ALLOWED_URIS.name, folder.format(tmp=tmp_path))
    storage.require_allowed(f"{tmp_path}/link/a.json")
    with pytest.raises(UserError, match="outside of the folders"):
        storage.require_allowed(f"{tmp_path}/data-2/a.json")


def test_links_that_lead_in_a_circle_are_no_path(tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(UserError, match="links lead in a circle"):
        storage.real_path(str(tmp_path / "circle"))


def test_a_missing_base_model_is_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not found"):
        storage.fetch(str(tmp_path / "nowhere"))


def test_a_name_that_is_no_path_is_looked_up_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The tests have no network. Of the two meanings, a mistyped path is the more likely one.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", Mock(side_effect=LocalEntryNotFoundError("no answer")))
    with pytest.raises(UserError, match=r"no such local path, and the hub cannot be reached.* tiny-base"):
        storage.fetch("build/modle", tmp_path)
    with pytest.raises(RetryableError, match=r"hf://owner/name: the hub does not answer.* tiny-base"):
        storage.fetch("hf://owner/name", tmp_path)


@pytest.mark.parametrize("look_up", [storage.fetch, partial(storage.read_model_file, name="config.json")])
@pytest.mark.parametrize("uri", ["owner/name", "hf://owner/name"])
def test_without_access_to_the_hub_a_way_to_try_is_named(
    look_up: Callable[[str], object], uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(AccessError, match=r"HF_HUB_OFFLINE is set; .*`minicpmv-finetune tiny-base`"):
        look_up(uri)


def test_staged_folder_appears_only_when_done(tmp_path: Path) -> None:
    final = tmp_path / "out" / "result"
    with storage.staged_folder(final) as staging:
        (staging / "file").write_text("content")
        assert not final.exists()
    assert files(tmp_path) == {"out/result/file": b"content"}


@pytest.mark.parametrize(
    ("uri", "sentence"),
    [
        ("~nobody-of-this-name/x", "~nobody-of-this-name/x: there is no such home directory"),
        ("no\nfile", "'no.nfile': not found"),
        ("s3://\n", "'s3://.n': not a valid address of an object"),
    ],
)
def test_odd_addresses_are_refused_in_one_line(uri: str, sentence: str, s3_uri: str) -> None:
    with pytest.raises(UserError, match=sentence) as error:
        storage.size(uri)
    assert "\n" not in str(error.value)


def test_files_that_a_library_made_readable_by_their_owner_only_become_readable_for_all(tmp_path: Path) -> None:
    with storage.staged_folder(tmp_path / "adapter") as folder:
        (folder / "inner").mkdir()
        for path in (folder / "weights", folder / "inner" / "weights"):
            path.touch(mode=0o600)
    for name in ("weights", "inner/weights"):
        assert (tmp_path / "adapter" / name).stat().st_mode & 0o777 == 0o644


def test_staged_folder_keeps_the_existing_folder_on_an_error(tmp_path: Path) -> None:
    (tmp_path / "result").mkdir()
    (tmp_path / "result" / "old").touch()
    with pytest.raises(FileExistsError), storage.staged_folder(tmp_path / "result") as staging:
        staging.mkdir()  # raises FileExistsError, as an example of an error
    assert files(tmp_path) == {"result/old": b""}


@pytest.mark.parametrize("is_folder", [True, False])
def test_staged_folder_replaces_an_existing_file_or_folder_as_a_whole(is_folder: bool, tmp_path: Path) -> None:
    final = tmp_path / "result"
    if is_folder:
        final.mkdir()
        (final / "old").touch()
    else:
        final.touch()
    with storage.staged_folder(final) as staging:
        (staging / "new").touch()
    assert files(tmp_path) == {"result/new": b""}
    assert list(tmp_path.iterdir()) == [final]


def test_staged_folder_that_cannot_be_made_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match="choose another folder"),
        storage.staged_folder(tmp_path / "file" / "result"),
    ):
        pass


def test_object_round_trip(s3_uri: str) -> None:
    storage.write_bytes(f"{s3_uri}/set/train.json", b"[]")
    assert storage.read_bytes(f"{s3_uri}/set/train.json") == b"[]"
    assert storage.read_bytes(f"minio{s3_uri.removeprefix('s3')}/set/train.json") == b"[]"


def test_keys_that_open_one_folder_are_enough(s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Profile's keys open only `private-artifacts/NAMESPACE/*`: even HeadBucket is forbidden to them."""
    folder = f"{s3_uri}/private-artifacts/team-a/run"
    asked = []
    send = vars(BaseClient)["_make_api_call"]

    def record(client: BaseClient, operation: str, parameters: dict[str, str]) -> Any:
        asked.append((operation, parameters.get("Key") or parameters.get("Prefix") or ""))
        return send(client, operation, parameters)

    monkeypatch.setattr(BaseClient, "_make_api_call", record)
    (tmp_path / "large").write_bytes(os.urandom(2**20))
    storage.check_upload(folder)
    storage.upload_file(tmp_path / "large", f"{folder}/large")
    storage.download_file(f"{folder}/large", tmp_path / "copy")
    storage.write_bytes(f"{folder}/set/train.json", b"[]")
    assert storage.read_bytes(f"{folder}/set/train.json", (0, 1)) == b"["
    assert storage.expand(f"{folder}/set/*.json") == [f"{folder}/set/train.json"]
    assert set(storage.walk(folder)) == {"large", "set/train.json"}
    assert storage.list_files(f"{folder}/set")
    assert storage.is_folder(f"{folder}/set")
    assert storage.size(f"{folder}/large") == 2**20
    storage.fetch(f"{folder}/set", tmp_path / "cache")
    storage.write_bytes(str(tmp_path / "out" / "done.json"), b"{}")
    storage.upload_folder(tmp_path / "out", f"{folder}/again", "done.json")
    storage.remove_file(f"{folder}/set/train.json")
    assert {operation for operation, _ in asked} >= {"PutObject", "GetObject", "ListObjectsV2"}
    assert [call for call in asked if not call[1].startswith("private-artifacts/team-a/")] == []


def test_fetch_of_an_object_keeps_its_name(s3_uri: str, tmp_path: Path) -> None:
    storage.write_bytes(f"{s3_uri}/set/train.json", b"[]")
    storage.write_bytes(f"{s3_uri}/set/train.json.old", b"other")
    path = storage.fetch(f"{s3_uri}/set/train.json", tmp_path)
    assert (path.name, path.read_bytes()) == ("train.json", b"[]")
    assert len(list(path.parent.iterdir())) == 1


@pytest.mark.parametrize("suffix", ["", "/"])
def test_fetch_of_a_folder_takes_only_the_objects_below_it(suffix: str, s3_uri: str, tmp_path: Path) -> None:
    content = {"config.json": b"{}", "deep/er/weights": b"1"}
    for name, value in content.items():
        storage.write_bytes(f"{s3_uri}/models/a/{name}", value)
    storage.write_bytes(f"{s3_uri}/models/a-2/config.json", b"other")
    assert files(storage.fetch(f"{s3_uri}/models/a{suffix}", tmp_path)) == content


def test_fetch_of_a_whole_bucket(s3_uri: str, tmp_path: Path) -> None:
    storage.write_bytes(f"{s3_uri}/config.json", b"{}")
    assert files(storage.fetch(s3_uri, tmp_path)) == {"config.json": b"{}"}


def test_fetch_downloads_once_until_the_data_is_overwritten(s3_uri: str, tmp_path: Path) -> None:
    storage.write_bytes(f"{s3_uri}/a/file", b"old")
    first = storage.fetch(f"{s3_uri}/a", tmp_path)
    written = (first / "file").stat().st_ino
    assert (storage.fetch(f"{s3_uri}/a", tmp_path) / "file").stat().st_ino == written
    storage.write_bytes(f"{s3_uri}/a/file", b"new")
    assert files(storage.fetch(f"{s3_uri}/a", tmp_path)) == {"file": b"new"}


def test_fetches_at_the_same_time_share_one_copy(s3_uri: str, tmp_path: Path) -> None:
    storage.write_bytes(f"{s3_uri}/a/file", os.urandom(2**20))

    def fetch(_: int) -> int:
        return (storage.fetch(f"{s3_uri}/a", tmp_path) / "file").stat().st_ino

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(fetch, range(8)))) == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_missing_bucket_and_key_are_mistakes(s3_uri: str, tmp_path: Path) -> None:
    for uri in (f"{s3_uri}/no/key", "s3://no-such-bucket/key"):
        with pytest.raises(UserError, match=f"{uri}: not found"):
            storage.read_bytes(uri)
        with pytest.raises(UserError, match=f"{uri}: not found"):
            storage.fetch(uri, tmp_path)
    with pytest.raises(UserError, match="not found"):
        storage.write_bytes("s3://no-such-bucket/key", b"")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("uri", ["s3://", "s3://bucket", "s3:///key", "s3://no bucket/key"])
def test_an_address_without_bucket_or_key_is_a_mistake(uri: str, s3_uri: str) -> None:
    with pytest.raises(UserError, match=r"write s3://bucket/key"):
        storage.read_bytes(uri)


def test_wrong_credentials_are_a_mistake_even_after_right_ones(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_bytes(f"{s3_uri}/file", b"content")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "mistyped-secret")
    with pytest.raises(UserError, match="access denied"):
        storage.read_bytes(f"{s3_uri}/file")
    with pytest.raises(UserError, match="access denied"):
        storage.write_bytes(f"{s3_uri}/file", b"other")
    with pytest.raises(UserError, match="access denied"):
        storage.fetch(f"{s3_uri}/file")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "minioadmin123")
    assert storage.read_bytes(f"{s3_uri}/file") == b"content"


def test_missing_credentials_are_a_mistake(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(UserError, match="no S3 credentials"):
        storage.read_bytes(f"{s3_uri}/file")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(UserError, match="set AWS_ACCESS_KEY_ID"):
        storage.read_bytes(f"{s3_uri}/file")


def test_a_malformed_endpoint_is_a_mistake(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost")
    with pytest.raises(UserError, match="AWS_ENDPOINT_URL"):
        storage.read_bytes(f"{s3_uri}/file")


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("AWS_DEFAULT_REGION", "bad region", "AWS_DEFAULT_REGION: .*'bad region'.*; write it like us-east-1"),
        ("AWS_PROFILE", "nosuch", r"s3://bucket/key: .*\(nosuch\).*; correct or unset AWS_PROFILE"),
        ("AWS_CONFIG_FILE", "{tmp}/config", "s3://bucket/key: .*/config; correct this file of AWS's configuration"),
    ],
)
def test_a_wrong_setting_of_aws_is_a_mistake_that_names_it(
    name: str, value: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config").write_text("[default")
    for variable, content in (("AWS_ACCESS_KEY_ID", "key"), ("AWS_SECRET_ACCESS_KEY", "secret"), (name, value)):
        monkeypatch.setenv(variable, content.format(tmp=tmp_path))
    with pytest.raises(UserError, match=sentence):
        storage.read_bytes("s3://bucket/key")


def test_a_server_that_is_down_is_reported_soon_and_worth_a_retry(
    s3_uri: str, unreachable: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", unreachable)
    started = time.monotonic()
    with pytest.raises(RetryableError, match="does not answer"):
        storage.fetch(f"{s3_uri}/file", tmp_path)
    assert time.monotonic() - started < 15


def test_files_are_copied_to_and_from_a_store(s3_uri: str, tmp_path: Path) -> None:
    content = os.urandom(3 * 2**20 + 1)
    (tmp_path / "file").write_bytes(content)
    storage.upload_file(tmp_path / "file", f"{s3_uri}/a/file")
    storage.write_bytes(f"{s3_uri}/a/deeper/file", b"")
    assert storage.list_files(f"{s3_uri}/a") == {"file": len(content)}
    assert storage.download_file(f"{s3_uri}/a/file", tmp_path / "copy") == hashlib.sha256(content).hexdigest()
    assert (tmp_path / "copy").read_bytes() == content
    assert storage.read_bytes(f"{s3_uri}/a/file", (1000, 50)) == content[1000:1050], (
        "the object was uploaded with a checksum of its whole content"
    )


def test_files_of_a_local_folder_are_listed_with_their_sizes(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"content")
    assert storage.list_files(str(tmp_path)) == {"file": 7}
    assert storage.list_files(str(tmp_path / "nowhere")) == {}


def test_copying_from_a_missing_object_or_bucket_is_explained(s3_uri: str, tmp_path: Path) -> None:
    assert storage.list_files(f"{s3_uri}/nowhere") == {}
    with pytest.raises(UserError, match="not found"):
        storage.download_file(f"{s3_uri}/nowhere", tmp_path / "copy")
    with pytest.raises(UserError, match="not found"):
        storage.list_files("s3://no-such-bucket/folder")


def test_a_large_object_that_is_fetched_in_parts_arrives_whole(s3_uri: str, tmp_path: Path) -> None:
    content = os.urandom(2**20) * 40
    (tmp_path / "weights").write_bytes(content)
    storage.upload_file(tmp_path / "weights", f"{s3_uri}/base/weights")
    assert storage.fetch(f"{s3_uri}/base/weights", tmp_path / "cache").read_bytes() == content


def test_threads_may_send_the_first_requests(s3_uri: str) -> None:
    """The process has not imported boto3 yet; its import is not safe with threads."""
    program = (
        "import sys; from concurrent.futures import ThreadPoolExecutor\n"
        "from minicpmv_finetune import storage\n"
        "with ThreadPoolExecutor(8) as pool:\n"
        "    list(pool.map(lambda n: storage.write_bytes(f'{sys.argv[1]}/{n}', b'content'), range(8)))\n"
    )
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", program, s3_uri], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_threads_that_begin_at_once_share_a_client(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-3")  # for which no other test has made one
    together = threading.Barrier(8)

    def make_client() -> object:
        together.wait()
        return s3.client()

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda _: make_client(), range(8)))) == 1


def test_an_interrupted_upload_continues(tmp_path: Path, s3_uri: str, s3_client: "S3Client") -> None:
    folder = tmp_path / "model"
    (folder / "below").mkdir(parents=True)
    names = ("a.safetensors", "b.safetensors", "below/c.txt", "config.json")
    for name in names:
        (folder / name).write_text(name)
    target = f"{s3_uri}/models/1"
    bucket = s3_uri.removeprefix("s3://")
    assert storage.upload_folder(folder, target, last="config.json") == 4
    for name in ("b.safetensors", "config.json"):
        s3_client.delete_object(Bucket=bucket, Key=f"models/1/{name}")
    assert storage.upload_folder(folder, target, last="config.json") == 2
    assert storage.upload_folder(folder, target, last="config.json") == 0
    fetched = storage.fetch(target, tmp_path / "cache")
    assert {name: (fetched / name).read_text() for name in names} == {name: name for name in names}


@pytest.mark.parametrize("name", ["notes.txt", "config.json", "below/notes.txt"])
@pytest.mark.parametrize("has_own", [False, True])
def test_foreign_objects_are_neither_deleted_nor_replaced(
    name: str, has_own: bool, tmp_path: Path, s3_uri: str, s3_client: "S3Client"
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_text("first")
    if has_own:
        storage.upload_folder(folder, f"{s3_uri}/model", last="weights")
    (folder / "config.json").write_text("second")
    s3_client.put_object(Bucket=s3_uri.removeprefix("s3://"), Key=f"model/{name}", Body=b"mine")
    before = storage.list_files(f"{s3_uri}/model")
    with pytest.raises(UserError, match=f"were not uploaded by this program, such as {name}"):
        storage.upload_folder(folder, f"{s3_uri}/model", last="config.json")
    assert storage.list_files(f"{s3_uri}/model") == before


def test_an_uploaded_object_that_somebody_has_changed_is_not_replaced(tmp_path: Path, s3_uri: str) -> None:
    (tmp_path / "config.json").write_text("first")
    storage.upload_folder(tmp_path, f"{s3_uri}/model", last="config.json")
    time.sleep(1.1)  # a store counts in seconds
    storage.write_bytes(f"{s3_uri}/model/config.json", b"mine")
    (tmp_path / "config.json").write_text("second")
    for act in (storage.check_upload, lambda uri: storage.upload_folder(tmp_path, uri, last="config.json")):
        with pytest.raises(UserError, match=r"contains config\.json, which has changed since this program uploaded it"):
            act(f"{s3_uri}/model")
    assert storage.read_bytes(f"{s3_uri}/model/config.json") == b"mine"


def test_a_record_of_another_program_is_not_replaced(tmp_path: Path, s3_uri: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    storage.write_bytes(f"{s3_uri}/model.sent.json", b"[1]")
    with pytest.raises(UserError, match="is not a record of this program"):
        storage.upload_folder(tmp_path, f"{s3_uri}/model", last="config.json")


def test_a_folder_that_changes_is_complete_or_absent(
    tmp_path: Path, s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "weights"):
        (folder / name).write_text("first")
    target = f"{s3_uri}/model"
    (folder / "old-weights").write_text("first")
    storage.upload_folder(folder, target, last="config.json")
    (folder / "old-weights").unlink()
    (folder / "weights").write_text("second")
    (folder / "weights-2").write_text("cannot be sent")
    seen = []

    def end(path: Path, uri: str) -> None:
        seen.append(sorted(storage.list_files(target)))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("minicpmv_finetune.storage.transfers.upload_file", end)
        with pytest.raises(KeyboardInterrupt):
            storage.upload_folder(folder, target, last="config.json")
    assert all("config.json" not in names for names in seen)
    assert "config.json" not in storage.list_files(target)
    assert storage.upload_folder(folder, target, last="config.json") == 3
    assert storage.read_bytes(f"{target}/weights") == b"second"
    assert sorted(storage.list_files(target)) == ["config.json", "weights", "weights-2"]


def test_a_name_that_exists_is_no_pattern(s3_uri: str, tmp_path: Path) -> None:
    for folder in ("br[1]", "br1"):
        for name in ("train.json", "a-1.json"):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / name).write_text("[]")
            storage.write_bytes(f"{s3_uri}/set/{folder}/{name}", b"[]")
    for place in (str(tmp_path), f"{s3_uri}/set"):
        assert storage.expand(f"{place}/br[1]/train.json") == [f"{place}/br[1]/train.json"]
        assert f"{place}/br[1]/a-1.json" in storage.expand(f"{place}/br[1]/a-*.json")
        assert storage.expand(f"{place}/br?/train.json") == [f"{place}/br1/train.json"]


def test_folders_and_files_are_distinguished(s3_uri: str, tmp_path: Path) -> None:
    for place in (s3_uri, str(tmp_path)):
        storage.write_bytes(f"{place}/set/train.json", b"[]")
        storage.write_bytes(f"{place}/set.json", b"[]")
        assert storage.is_folder(place)
        assert storage.is_folder(f"{place}/set")
        assert storage.is_folder(f"{place}/set/")
        assert not storage.is_folder(f"{place}/set/train.json")
        assert not storage.is_folder(f"{place}/se")
        assert not storage.is_folder(f"{place}/set.json")


@pytest.mark.parametrize(
    ("asked", "stored"),
    [("caf\u00e9.png", "cafe\u0301.png"), ("cafe\u0301.png", "caf\u00e9.png"), ("a.png ", "a.png"), ("A.PNG", "a.png")],
)
def test_a_missing_file_that_looks_like_another_is_explained(asked: str, stored: str, tmp_path: Path) -> None:
    (tmp_path / stored).write_bytes(b"")
    with pytest.raises(UserError) as raised:
        storage.read_bytes(str(tmp_path / asked))
    assert f"not found; the folder has {stored!a}, so make the two names equal" in str(raised.value)
    assert (ascii(asked)[1:-1] if "\u0301" in asked else asked) in str(raised.value)
    if asked != asked.strip():
        assert f"{asked}'" in str(raised.value), "a blank at the end can be seen"


@pytest.mark.parametrize("value", ["", " ", "\n"])
def test_a_blank_variable_counts_as_unset(value: str) -> None:
    assert environment.EXPERIMENT.read({"MLFLOW_EXPERIMENT_NAME": value}) == "minicpmv-finetune"


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(UserError, match="is no regular file"):
            storage.read_bytes(str(place))
        with pytest.raises(UserError, match="is no regular file"), storage.open_stream(str(place)):
            pass


@pytest.mark.parametrize("fails", [False, True])
def test_a_file_beside_an_output_is_stored_also_after_a_failure(s3_uri: str, tmp_path: Path, fails: bool) -> None:
    expected: AbstractContextManager[object] = pytest.raises(UserError) if fails else nullcontext()
    with (
        expected,
        storage.kept_beside(f"{s3_uri}/task/dataset", str(tmp_path / "dataset"), "rejects.jsonl") as path,
    ):
        path.write_text("one")
        if fails:
            raise UserError("too many")
    assert storage.read_bytes(f"{s3_uri}/task/rejects.jsonl") == b"one"
    assert path == tmp_path / "rejects.jsonl"


def test_a_servers_error_that_botocore_cannot_parse_is_worth_a_retry() -> None:
    sentence = "s3://bucket/key: the store answers with an error of its own"
    with pytest.raises(RetryableError, match=sentence), explain_failures("s3://bucket/key"):
        raise AttributeError("'StreamingChecksumBody' object has no attribute 'strip'")
    with pytest.raises(AttributeError), explain_failures("s3://bucket/key"):
        raise AttributeError("another bug")


def test_an_answer_that_botocore_cannot_parse_is_asked_for_again(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_bytes(f"{s3_uri}/lease", b"content")
    plain: Any = vars(BaseClient)["_make_api_call"]
    failures = [AttributeError("'StreamingChecksumBody' object has no attribute 'strip'")]

    def call(connection: Any, operation: str, parameters: Any) -> Any:
        if operation == "GetObject" and failures:
            raise failures.pop()
        return plain(connection, operation, parameters)

    monkeypatch.setattr(BaseClient, "_make_api_call", call)
    assert storage.read_bytes(f"{s3_uri}/lease") == b"content"
    assert not failures
