import pickle

import pytest

from minicpmv_finetune.errors import RetryableError, UserError, without_password


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
