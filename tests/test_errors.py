import pickle

import pytest

from minicpmv_finetune.errors import RetryableError, UserError


@pytest.mark.parametrize("kind", [UserError, RetryableError])
def test_what_is_quoted_makes_no_second_line(kind: type[UserError | RetryableError]) -> None:
    error = kind("a\nname\r\nerror: forged: no such file; check it.")
    assert str(error) == "a name error: forged: no such file; check it."
    # Workers hand it to their parent.
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
