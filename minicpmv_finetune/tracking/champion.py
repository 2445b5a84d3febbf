"""Which model is champion, moved by hand."""

from minicpmv_finetune.errors import RetryableError

from .registry import OvertakenError, open_registry


def promote(name: str, version: str, reason: str) -> str:
    """Make a version champion; returns what happened.

    Raises:
        UserError: there is no such version or no registry.
        RetryableError: another move was faster, or MLflow does not answer.
    """
    registry = open_registry(name)
    chosen = registry.version(version)
    try:
        move = registry.promote(chosen.number, None, f"by hand: {reason}")
    except OvertakenError as error:
        raise RetryableError(f"{name}: {error}; look at that one, and try again.") from error
    return f"champion of {name}: version {move.version}, {_before(move.previous)} (the gate said: {chosen.gate})"


def rollback(name: str, reason: str) -> str:
    """Make the champion's predecessor champion again; returns what happened.

    Raises:
        UserError: there is no predecessor or no registry.
        RetryableError: another move was faster, or MLflow does not answer.
    """
    try:
        move = open_registry(name).rollback(f"by hand: {reason}")
    except OvertakenError as error:
        raise RetryableError(f"{name}: {error}; look at that one, and try again.") from error
    return f"champion of {name}: version {move.version} again, {_before(move.previous)}"


def _before(version: str) -> str:
    return f"before it was version {version}" if version else "the first one"
