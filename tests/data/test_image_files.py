"""The members of an archive are found by their addresses, however many there are."""

import io
import tarfile
from pathlib import Path

from minicpmv_finetune.data import image_files


def test_each_file_of_an_archive_is_found_by_its_address(tmp_path: Path) -> None:
    path = tmp_path / "images.tar"
    contents = {f"./folder/{number}.png": bytes([number % 251]) * number for number in range(300)}
    with tarfile.open(path, "w") as archive:
        for name, content in [*contents.items(), ("again.png", b"old"), ("again.png", b"new")]:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "again.png"
        archive.addfile(link)
    members = image_files.list_archive(str(path))
    for name, content in {**contents, "again.png": b"new"}.items():
        address = f"{path}!{name.removeprefix('./')}"
        assert image_files.read(address, members.get(address)) == content
    for missing in ("link.png", "folder", "300.png", ""):
        assert members.get(f"{path}!{missing}") is None


def test_an_archive_may_be_empty(tmp_path: Path) -> None:
    tarfile.open(tmp_path / "empty.tar", "w").close()
    assert image_files.list_archive(str(tmp_path / "empty.tar")).get("a.png") is None
