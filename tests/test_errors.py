import errno
import pickle

import pytest

from minicpmv_finetune.errors import RetryableError, UserError, explain_disk_errors, without_password
from minicpmv_finetune.storage.failures import explain_failures


@pytest.mark.parametrize("kind", [UserError, RetryableError])
def test_a_message_is_one_line_whatever_it_quotes(kind: type[UserError | RetryableError]) -> None:
    error = kind("a\nname\r\nerror: forged: no such file; check it.")
    assert str(error) == "a name error: forged: no such file; check it."
    # Worker processes send errors to their parent.
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://user:hidden@host:5000/path", "http://host:5000/path"),
        ("https://hidden@host", "https://host"),
        ("at https://user:hid@den@host/ and http://host:80", "at https://host/ and http://host:80"),
        ("postgresql+psycopg2://user:hid/den@host/db", "postgresql+psycopg2://host/db"),
        ("http://host:8080/images/a@2x.png", "http://host:8080/images/a@2x.png"),
        ("s3://bucket/a@b", "s3://bucket/a@b"),
        ("hf://owner/name@revision and hf://name@revision", "hf://owner/name@revision and hf://name@revision"),
        ("/data//a@b", "/data//a@b"),
    ],
)
def test_an_address_is_shown_without_user_and_password(text: str, expected: str) -> None:
    assert without_password(text) == expected
    assert str(UserError(text)) == str(RetryableError(text)) == expected


FULL_DISKS = {
    "OSError": OSError(errno.ENOSPC, "No space left on device", "/out/file"),
    "quota": OSError(errno.EDQUOT, "Disk quota exceeded", "/out/file"),
    "limit of a file": OSError(errno.EFBIG, "File too large", "/out/file"),
    "safetensors": Exception("Error while serializing: I/O error: File too large (os error 27)"),
    "tokenizers": Exception("No space left on device (os error 28)"),
    "sqlite": Exception("(sqlite3.OperationalError) database or disk is full"),
    "torch.save": RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
    "torch's writer": RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
}


@pytest.mark.parametrize("error", FULL_DISKS.values(), ids=FULL_DISKS)
def test_a_full_disk_has_one_sentence_whichever_library_meets_it(error: Exception) -> None:
    later = ValueError("while saving")
    later.__cause__ = error
    with pytest.raises(RetryableError, match="no space is left on the disk") as raised, explain_disk_errors():
        raise later
    assert ("ulimit -f" in str(raised.value)) == ("File too large" in str(error))


@pytest.mark.parametrize("name", ["OSError", "quota", "limit of a file"])
def test_a_full_disk_has_the_same_sentence_for_files_of_a_store(name: str) -> None:
    with (
        pytest.raises(RetryableError, match=r"^/out/file: no space is left on the disk"),
        explain_failures("/out/file"),
    ):
        raise FULL_DISKS[name]
