"""`upload`: data and images of this machine into the object store of a cluster, with keys and address from there."""

import base64
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image

from minicpmv_finetune import storage
from minicpmv_finetune.inputs import checks
from minicpmv_finetune.kubeflow import store
from tests.cluster.commands import Answer, Command
from tests.cluster.fake_kubernetes import FakeKubernetes

IMAGE = b"not decoded here"
READ_DATA = checks._read_data  # the fixtures of this folder leave it out


def _sample(image: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A cat."}]
    return {"image": image, "conversations": turns}


@pytest.fixture
def data(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a data file beside two images, one of them in a folder."""
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "one.png").write_bytes(IMAGE)
    (folder / "two.png").write_bytes(IMAGE + b"2")

    def write(*images: Any, name: str = "train.json") -> Path:
        path = folder / name
        path.write_text(json.dumps([_sample(image) for image in images]))
        return path

    return write


def _upload(command: Command, profile: Callable[..., Path], root: str, *words: str | Path) -> Answer:
    return command("upload", *words, "--profile", profile(pipeline_root=root))


def _images(uri: str) -> list[str]:
    """The addresses of the images that a data file in the store names."""
    content = storage.read_bytes(uri).decode()
    items = json.loads(content) if content.startswith("[") else [json.loads(line) for line in content.splitlines()]
    images = [
        one
        for item in items
        for one in (item["image"].values() if isinstance(item["image"], dict) else [item["image"]])
    ]
    return [storage.resolve(image, storage.parent(uri)) for image in images]


def test_data_and_images_are_copied_under_a_digest_of_their_content(
    data: Callable[..., Path], command: Command, profile: Callable[..., Path], s3_uri: str
) -> None:
    path = data("images/one.png", {"<image_00>": "./two.png", "<image_01>": "images/one.png"})
    first = _upload(command, profile, s3_uri, path)
    uri = first.out.strip()
    assert (first.code, uri.startswith(f"{s3_uri}/minicpmv-data/"), uri.endswith("/train.json")) == (0, True, True)
    assert storage.read_bytes(uri) == path.read_bytes()
    assert [storage.read_bytes(image) for image in _images(uri)] == [IMAGE, IMAGE + b"2", IMAGE]
    again = _upload(command, profile, s3_uri, path, "--output", "json").json
    assert (again["uris"], again["files"], again["sent"]) == ([uri], 3, 0)
    # Another content has another address, and the first stays as it was.
    (path.parent / "two.png").write_bytes(b"other")
    assert _upload(command, profile, s3_uri, path).out.strip() != uri
    assert storage.read_bytes(_images(uri)[1]) == IMAGE + b"2"


def test_an_interrupted_upload_sends_only_the_rest(
    data: Callable[..., Path], command: Command, profile: Callable[..., Path], s3_uri: str
) -> None:
    path = data("images/one.png", "two.png")
    uri = _upload(command, profile, s3_uri, path).out.strip()
    storage.remove_file(uri)
    storage.remove_file(_images_of(path, uri)[1])
    assert _upload(command, profile, s3_uri, path, "--dry-run", "--output", "json").json["sent"] == 2
    assert _upload(command, profile, s3_uri, path, "--output", "json").json["sent"] == 2
    assert storage.read_bytes(_images(uri)[1]) == IMAGE + b"2"


def _images_of(path: Path, uri: str) -> list[str]:
    return [storage.join(storage.parent(uri), item["image"]) for item in json.loads(path.read_text())]


def test_absolute_paths_become_relative_ones(
    data: Callable[..., Path], command: Command, profile: Callable[..., Path], s3_uri: str, tmp_path: Path
) -> None:
    path = data(str(tmp_path / "data" / "images" / "one.png"), "two.png", "s3://other/three.png")
    done = _upload(command, profile, s3_uri, path)
    assert (done.code, "images named by a URI: 1 stays where it is" in done.err) == (0, True)
    images = _images(done.out.strip())
    assert [storage.read_bytes(image) for image in images[:2]] == [IMAGE, IMAGE + b"2"]
    assert images[2] == "s3://other/three.png"


@pytest.mark.parametrize("kind", ["absolute", "parent", "link", "linked folder"])
def test_images_outside_of_the_datas_folder_are_copied_only_on_request(
    kind: str, data: Callable[..., Path], command: Command, profile: Callable[..., Path], s3_uri: str, tmp_path: Path
) -> None:
    secret = tmp_path / "elsewhere" / "secret.png"
    secret.parent.mkdir()
    secret.write_bytes(b"secret")
    (tmp_path / "data" / "link.png").symlink_to(secret)
    (tmp_path / "data" / "linked").symlink_to(secret.parent)
    image = {
        "absolute": str(secret),
        "parent": "../elsewhere/secret.png",
        "link": "link.png",
        "linked folder": "linked/secret.png",
    }[kind]
    path = data("two.png", image)
    refused = _upload(command, profile, s3_uri, path)
    assert refused.code == 2
    assert image in refused.err
    assert "--outside" in refused.err
    assert storage.walk(s3_uri) == {}
    done = _upload(command, profile, s3_uri, path, "--outside")
    assert [storage.read_bytes(found) for found in _images(done.out.strip())] == [IMAGE + b"2", b"secret"]


def test_several_data_files_and_an_archive_keep_their_places(
    data: Callable[..., Path], command: Command, profile: Callable[..., Path], s3_uri: str, tmp_path: Path
) -> None:
    with tarfile.open(tmp_path / "data" / "a.tar", "w") as archive:
        archive.add(tmp_path / "data" / "two.png", "inside.png")
    files = (data("a.tar!inside.png", "a.tar!inside.png"), data("two.png", name="eval.json"))
    uris = _upload(command, profile, s3_uri, *files).out.split()
    assert [uri.rpartition("/")[2] for uri in uris] == ["train.json", "eval.json"]
    names = set(storage.walk(storage.parent(uris[0])))
    assert names == {"a.tar", "train.json", "eval.json", "two.png"}


@pytest.mark.parametrize(
    ("images", "words", "sentence"),
    [
        (["no.png", "none.png"], [], "none of the 2 images exists"),
        (["two.png"], ["--to", "/tmp/x"], "is no place in an object store"),
        (None, [], "not found; give data files"),
    ],
)
def test_mistakes_are_named_before_anything_is_sent(
    images: list[str] | None,
    words: list[str],
    sentence: str,
    data: Callable[..., Path],
    command: Command,
    profile: Callable[..., Path],
    s3_uri: str,
    tmp_path: Path,
) -> None:
    path = tmp_path / "no.json" if images is None else data(*images)
    done = _upload(command, profile, s3_uri, path, *words)
    assert done.code == 2
    assert sentence in done.err
    assert storage.walk(s3_uri) == {}


def test_data_in_another_format_is_refused_before_it_is_copied(
    data: Callable[..., Path],
    command: Command,
    profile: Callable[..., Path],
    s3_uri: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checks, "_read_data", READ_DATA)
    path = data()
    path.write_text(json.dumps([{"image": "two.png", "conversations": [{"from": "human", "value": "What?"}]}]))
    done = _upload(command, profile, s3_uri, path)
    assert done.code == 2
    assert "import-data" in done.err
    assert storage.walk(s3_uri) == {}


def test_some_missing_images_are_reported_and_left_to_the_validation(
    data: Callable[..., Path], command: Command, profile: Callable[..., Path], s3_uri: str
) -> None:
    done = _upload(command, profile, s3_uri, data("two.png", "no.png"))
    assert done.code == 0
    assert "1 image does not exist" in done.err


def test_a_place_that_runs_may_not_read_is_refused(
    data: Callable[..., Path], command: Command, profile: Callable[..., Path], s3_uri: str
) -> None:
    limited = profile(pipeline_root=s3_uri, allowed_uris=["s3://datasets/"])
    done = command("upload", data("two.png"), "--profile", limited)
    assert done.code == 2
    assert "allowed_uris" in done.err


@pytest.fixture
def in_cluster_store(
    kubernetes_server: FakeKubernetes, s3_server: dict[str, str], s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> FakeKubernetes:
    """A stock Kubeflow's object store: a Service, its pod, and the Secret with the keys; nothing in the environment."""
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    space = "/api/v1/namespaces/kubeflow"
    keys = {"accesskey": s3_server["AWS_ACCESS_KEY_ID"], "secretkey": s3_server["AWS_SECRET_ACCESS_KEY"]}
    kubernetes_server.objects.update(
        {
            f"{space}/secrets/mlpipeline-minio-artifact": {
                "data": {key: base64.b64encode(value.encode()).decode() for key, value in keys.items()}
            },
            f"{space}/configmaps/kfp-launcher": {"data": {"defaultPipelineRoot": f"minio{s3_uri[2:]}/v2/artifacts"}},
        }
    )
    address = urlsplit(s3_server["AWS_ENDPOINT_URL"])
    kubernetes_server.add_service("kubeflow", "seaweedfs", 9000, (str(address.hostname), int(address.port or 0)))
    return kubernetes_server


STOCK = {
    "namespace": "kubeflow",
    "pipeline_root": "",
    "s3": {
        "endpoint": "http://seaweedfs.kubeflow:9000",
        "secret": "mlpipeline-minio-artifact",
        "variables": {"accesskey": "AWS_ACCESS_KEY_ID", "secretkey": "AWS_SECRET_ACCESS_KEY"},
    },
}


def test_from_outside_keys_root_and_address_come_from_the_cluster(
    data: Callable[..., Path],
    command: Command,
    profile: Callable[..., Path],
    in_cluster_store: FakeKubernetes,
    s3_uri: str,
    s3_client: Any,
    tmp_path: Path,
) -> None:
    large = tmp_path / "data" / "large.png"
    Image.effect_noise((1500, 1500), 90).save(large)
    done = command("upload", data("images/one.png", "large.png"), "--profile", profile(**STOCK))
    assert done.code == 0, done.err
    uri = done.out.strip()
    assert uri.startswith(f"{s3_uri}/v2/artifacts/minicpmv-data/")
    received = io.BytesIO()
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    s3_client.download_fileobj(bucket, key.replace("train.json", "large.png"), received)
    assert received.getvalue() == large.read_bytes()


def test_the_environments_keys_and_address_have_priority(
    in_cluster_store: FakeKubernetes, monkeypatch: pytest.MonkeyPatch, profile: Callable[..., Path]
) -> None:
    from minicpmv_finetune.kubeflow.profile import load_profile

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store.example.com")
    monkeypatch.setenv("AWS_PROFILE", "mine")
    store.use_store(load_profile(profile(**STOCK)))
    assert in_cluster_store.requests == []


def test_a_user_who_may_not_read_services_gets_a_sentence(
    data: Callable[..., Path], command: Command, profile: Callable[..., Path], in_cluster_store: FakeKubernetes
) -> None:
    in_cluster_store.objects["/api/v1/namespaces/kubeflow/services/seaweedfs"] = 403
    done = command("upload", data("two.png"), "--profile", profile(**STOCK))
    assert done.code == 2
    assert "no permission to read Service seaweedfs in kubeflow" in done.err
