"""Promotion and rollback of the champion by hand."""

from minicpmv_finetune.errors import RetryableError

from .registry import OvertakenError, open_registry


def promote(name: str, version: str, reason: str) -> str:
    """Make a version champion.

    Args:
        name: Name of the registered model.
        version: Number of the version.
        reason: Why, for the log of moves.

    Returns:
        The result, in one sentence.

    Raises:
        UserError: There is no such version or no registry.
        RetryableError: Another process moved the champion first, or MLflow does not answer.
    """
    registry = open_registry(name)
    chosen = registry.version(version)
    try:
        move = registry.promote(chosen.number, None, f"by hand: {reason}")
    except OvertakenError as error:
        raise RetryableError(f"{name}: {error}; check that version, and try again.") from error
    return f"champion of {name}: version {move.version}, {_before(move.previous)} (the gate's reason: {chosen.gate})"


def rollback(name: str, reason: str) -> str:
    """Make the champion's predecessor champion again.

    Args:
        name: Name of the registered model.
        reason: Why, for the log of moves.

    Returns:
        The result, in one sentence.

    Raises:
        UserError: There is no predecessor or no registry.
        RetryableError: Another process moved the champion first, or MLflow does not answer.
    """
    try:
        move = open_registry(name).rollback(f"by hand: {reason}")
    except OvertakenError as error:
        raise RetryableError(f"{name}: {error}; check that version, and try again.") from error
    return f"champion of {name}: version {move.version} again, {_before(move.previous)}"


def _before(version: str) -> str:
    return f"before it was version {version}" if version else "the first one"
