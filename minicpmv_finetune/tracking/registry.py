"""The tuned models, the current champion and the history of champions, in MLflow's model registry.

Each model that passed the gate is registered as a version by its address, with its facts in tags; the newest version
has the alias `challenger`. Serving loads the version with the alias `champion`.

**Two concurrent runs cannot both promote.** MLflow overwrites an alias unconditionally, so the alias cannot decide
between them. An append-only log decides: a second registered model, `NAME.moves`, whose versions are the moves of the
champion. MLflow numbers them consecutively, by a unique key of its database, and a move and its tags become visible
together. Each move names the move that it was decided after (`after`), and is valid only if that one was the last
valid move: of several moves that were decided on the same champion, the first is valid, and all readers of the log
agree on that. The number of a move is therefore its fencing token, and a decision expires as soon as another move is
valid. No lock is held that a killed process could leave behind.

The alias follows the log: a process that sets the alias reads the log again afterwards, and sets the alias again if
the log has grown. Only a process that is killed in between can leave an older champion in the alias; the next reader
of the champion corrects that. For this reason `champion` is moved by `minicpmv-finetune promote` and `rollback`, not
by hand in MLflow.
"""

import json
import random
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minicpmv_finetune import environment, storage
from minicpmv_finetune.errors import RetryableError, UserError, first_line, without_password

from .promotion_record import PromotionRecord
from .step_runs import browser_address, mlflow_client

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHAMPION, CHALLENGER = "champion", "challenger"
_TAG = "minicpmv."
_MOVES = ".moves"
_LONGEST_NAME = 200  # characters; MLflow stores 256, those of the log included
_MODEL_DESCRIPTION = (
    "Models that passed the gate of minicpmv-finetune; each version's tags contain its address and scores. The alias "
    "`champion` names the version to serve, and `challenger` the newest. Move the champion with `minicpmv-finetune "
    "promote` and `minicpmv-finetune rollback`, because the log {name}.moves decides it."
)
_LOG_DESCRIPTION = (
    "This is not a model but the log of the champions of {name}: each version is one promotion or rollback, with its "
    "reason in description and tags. minicpmv-finetune reads from it which version of {name} is champion. Do not edit "
    "or delete it; serve {name}, alias `champion`."
)
_ATTEMPTS = 6  # to write a move while other processes write moves too
_LONGEST_WAIT = 2.0  # seconds between two attempts
# MLflow's error codes.
_FORBIDDEN = {"PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"}
_INVALID = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "INVALID_STATE"}
_MISSING = "RESOURCE_DOES_NOT_EXIST"


@dataclass(frozen=True)
class Version:
    """A version of a registered model.

    Attributes:
        number: Number that MLflow gave the version, from 1.
        uri: Address of the merged folder.
        adapter_uri: Address of the adapter, or of the full fine-tune; empty if unknown.
        base_model: Base checkpoint of the tuning, as the user gave it.
        data_fingerprint: Fingerprint of the data that the model was tuned and evaluated on.
        gate: Reason of the gate's decision, in words.
    """

    number: str
    uri: str
    adapter_uri: str
    base_model: str
    data_fingerprint: str
    gate: str


@dataclass(frozen=True)
class Move:
    """A valid change of the champion.

    Attributes:
        number: Position in the log; grows with every move.
        version: Version that is champion after the move.
        previous: Version that was champion before the move; empty when there was none.
        kind: "promotion" or "rollback".
        reason: Why the champion was moved, in words.
        claim: Identifier of the process or run that moved, by which a retry recognizes its own move.
    """

    number: int
    version: str
    previous: str
    kind: str
    reason: str
    claim: str


class OvertakenError(Exception):
    """The champion is not, or no longer, the version that a promotion was decided on."""

    def __init__(self, champion: str) -> None:
        super().__init__(f"the champion is {f'version {champion}' if champion else 'none'} now")
        self.champion = champion


def is_configured() -> bool:
    """Whether an MLflow server is named in the environment."""
    return bool(environment.TRACKING_URI.read())


def open_registry(name: str) -> "Registry":
    """Open the registry of one model, after a check that the server answers.

    Raises:
        UserError: No server is named, its address or the name is invalid, or the server refuses.
        RetryableError: The server does not answer.
    """
    if not is_configured():
        raise UserError(
            f"{environment.TRACKING_URI} is not set, so there is no model registry; set it to MLflow's address, or "
            "to sqlite:///OUT/mlflow.db for the models of `minicpmv-finetune run --out OUT`."
        )
    check_name(name)
    address = without_password(environment.TRACKING_URI.read())
    try:
        client = mlflow_client()
    except Exception as error:  # each kind of address has a library of its own, with its own errors
        raise UserError(
            f"{environment.TRACKING_URI}: {address} cannot be used ({without_password(first_line(error)):.200}); give "
            "the address of an MLflow server, such as http://localhost:5000, or of a database, such as "
            "sqlite:///mlflow.db."
        ) from error
    registry = Registry(name, client)
    registry.check()
    return registry


def check_name(name: str) -> None:
    """Refuse a name that no registered model can have.

    Raises:
        UserError: As the text says.
    """
    is_long = len(name) > _LONGEST_NAME
    if is_long or not name.strip() or name in (".", "..") or any(mark in name for mark in "'/:"):
        raise UserError(
            f"registered_model: {name[:_LONGEST_NAME]!r} cannot name a model in MLflow; use at most {_LONGEST_NAME} "
            "letters, digits and dashes."
        )


def link_to_newest(name: str) -> str:
    """A line of Markdown with a link to the version that was registered last; empty without a name or an address."""
    return _link(name, lambda: open_registry(name).challenger())


def link_to_champion(name: str) -> str:
    """The same for the champion; empty where there is none."""
    return _link(name, lambda: champion_of(name))


def _link(name: str, find: Callable[[], Version | None]) -> str:
    address = browser_address()
    if not name or not address.startswith("http"):
        return ""
    try:
        version = find()
    except (UserError, RetryableError):
        return ""  # the work is done, and only the link is missing
    page = f"{address}/#/models/{urllib.parse.quote(name)}"
    return f"\n[Version {version.number} in MLflow]({page}/versions/{version.number})\n" if version else ""


def champion_of(name: str) -> Version | None:
    """The champion of a registered model; None without a name, a server or a champion.

    Raises:
        UserError: The server refuses.
        RetryableError: The server does not answer.
    """
    return open_registry(name).champion() if name and is_configured() else None


def champion_to_beat(name: str) -> Version | None:
    """The champion, if there is one, after a check that its folder still exists.

    Raises:
        UserError: The champion's folder is gone, or the server refuses.
        RetryableError: The server or the store does not answer.
    """
    champion = champion_of(name)
    if champion is not None and not storage.list_files(champion.uri):
        raise UserError(
            f"{champion.uri}: version {champion.number} of {name} is champion, but its folder is gone; promote a "
            "version whose folder still exists, or give another registered_model."
        )
    return champion


def list_versions(client: "MlflowClient", name: str = "") -> list["ModelVersion"]:
    """All versions of a registered model, oldest first; none when there is no such model.

    Args:
        client: Connection to MLflow.
        name: Name of the registered model; empty for the versions of all models.

    Raises:
        UserError: The server refuses.
        RetryableError: The server does not answer.
    """
    found: list[ModelVersion] = []
    query, token = f"name = '{name}'" if name else None, None
    with _explained(name or "model registry"):
        while True:
            page = client.search_model_versions(query, max_results=1000, page_token=token)
            found += page
            token = page.token
            if not token:
                return sorted(found, key=lambda version: int(version.version))


class Registry:
    """The versions of one registered model. Every method may raise `UserError` or `RetryableError`."""

    def __init__(self, name: str, client: "MlflowClient") -> None:
        self.name = name
        self._client = client

    def check(self) -> None:
        """Check that the server answers, before any work that needs it."""
        with _explained(self.name):
            self._client.search_registered_models(max_results=1)

    def champion(self) -> Version | None:
        """The current champion; None when no version was ever promoted."""
        moves = self.moves()
        if not moves:
            return self._aliased(CHAMPION)
        self._update_alias()
        return self.version(moves[-1].version)

    def challenger(self) -> Version | None:
        """The version that was registered last."""
        return self._aliased(CHALLENGER)

    def version(self, number: str) -> Version:
        """The version with this number."""
        with _explained(self.name):
            return _version(self._client.get_model_version(self.name, number))

    def register(self, record: PromotionRecord, run_id: str | None = None) -> Version:
        """Register a model, unless it is registered already; it becomes the challenger.

        Args:
            record: Result of the evaluation.
            run_id: Id of the MLflow run that registers the model.
        """
        uri = _s3_address(record.model_uri)
        with _explained(self.name):
            versions = list_versions(self._client, self.name)
            known = [version for version in versions if version.tags.get(f"{_TAG}model_uri") == uri]
            entry = known[-1] if known else self._create_from_record(uri, record, run_id)
            self._client.set_registered_model_alias(self.name, CHALLENGER, entry.version)
            return _version(entry)

    def promote(self, number: str, over: str | None, reason: str, claim: str = "") -> Move:
        """Make a version champion.

        Args:
            number: Number of the version.
            over: Number of the champion that the version was compared with; empty when there was none, None to
                promote whatever the champion is.
            reason: Why the version is promoted, in words.
            claim: Identifier of the promotion, such as a pipeline run's id, which a retry gives again; by default
                every call is a promotion of its own.

        Raises:
            OvertakenError: The champion is not `over`.
        """
        self.version(number)
        moves = self.moves()
        done = [move for move in moves if claim and move.claim == claim]
        if moves and moves[-1].version == number:
            done = moves[-1:]
        if done:
            self._settle(done[-1])
            return done[-1]
        if over is not None and over != self._current_champion(moves):
            raise OvertakenError(self._current_champion(moves))
        return self._move(moves, number, "promotion", reason, claim)

    def rollback(self, reason: str) -> Move:
        """Make the champion's predecessor champion again; each repetition goes back one champion further.

        Raises:
            OvertakenError: Another process moved the champion at the same time.
        """
        moves = self.moves()
        line = _line_of_champions(moves)
        if len(line) < 2:
            raise UserError(f"{self.name}: no champion came before the present one; promote a version instead.")
        return self._move(moves, line[-2], "rollback", reason)

    def moves(self) -> list[Move]:
        """The valid moves, oldest first."""
        valid: list[Move] = []
        for entry in list_versions(self._client, f"{self.name}{_MOVES}"):
            if int(entry.tags.get("after", -1)) == (valid[-1].number if valid else 0):
                facts = {key: entry.tags.get(key, "") for key in ("version", "previous", "kind", "reason", "claim")}
                valid.append(Move(number=int(entry.version), **facts))
        return valid

    def _current_champion(self, moves: list[Move]) -> str:
        """Number of the champion's version; empty when there is none."""
        if moves:
            return moves[-1].version
        champion = self._aliased(CHAMPION)
        return champion.number if champion else ""

    def _move(self, moves: list[Move], number: str, kind: str, reason: str, claim: str = "") -> Move:
        """Write a valid move to the log.

        Raises:
            OvertakenError: Another process wrote a valid move first.
        """
        claim = claim or uuid.uuid4().hex
        after = moves[-1].number if moves else 0
        previous = self._current_champion(moves)
        tags = {"version": number, "previous": previous, "kind": kind, "reason": reason, "claim": claim}
        for attempt in range(_ATTEMPTS):
            failure: RetryableError | None = None
            try:
                self._write_move({**tags, "after": str(after)})
            except RetryableError as error:
                # The move may have been written nevertheless; the log is read next.
                failure = error
            now = self.moves()
            own = [move for move in now if move.claim == claim]
            if own:
                self._settle(own[0])
                return own[0]
            if (now[-1].number if now else 0) != after:
                raise OvertakenError(now[-1].version)
            if failure is not None and attempt == _ATTEMPTS - 1:
                raise failure
            time.sleep(random.uniform(0, min(_LONGEST_WAIT, 0.1 * 2**attempt)))  # noqa: S311
        raise RetryableError(f"{self.name}: MLflow did not store the move to version {number}; try again.")

    def _write_move(self, tags: Mapping[str, str]) -> None:
        log = f"{self.name}{_MOVES}"
        with _explained(self.name):
            self._explain_log(log)
            self._create(
                log,
                model_description=_LOG_DESCRIPTION.format(name=self.name),
                source=f"models:/{self.name}/{tags['version']}",
                tags=dict(tags),
                description=f"{tags['kind']} of version {tags['version']}: {tags['reason']}",
            )

    def _explain_log(self, log: str) -> None:
        """Give a log that an earlier version created its description; a log that does not exist gets it later."""
        from mlflow.exceptions import MlflowException

        description = _LOG_DESCRIPTION.format(name=self.name)
        with suppress(MlflowException):
            if self._client.get_registered_model(log).description != description:
                self._client.update_registered_model(log, description)

    def _settle(self, move: Move) -> None:
        """Bring alias and tags up to date with the log; repeated calls are harmless."""
        self._update_alias()
        with _explained(self.name):
            promoted = f"{move.kind}: {move.reason}"
            self._client.set_model_version_tag(self.name, move.version, f"{_TAG}{CHAMPION}", promoted)
            if move.previous and move.previous != move.version:
                replaced = f"{move.kind} of version {move.version}: {move.reason}"
                self._client.set_model_version_tag(self.name, move.previous, f"{_TAG}replaced_by", replaced)

    def _update_alias(self) -> None:
        """Set the alias to the log's last champion, and repeat it until the log no longer changes."""
        last = self.moves()[-1]
        while True:
            present = self._aliased(CHAMPION)
            if present is None or present.number != last.version:
                with _explained(self.name):
                    self._client.set_registered_model_alias(self.name, CHAMPION, last.version)
            now = self.moves()[-1]
            if now.number == last.number:
                return
            last = now

    def _aliased(self, alias: str) -> Version | None:
        from mlflow.exceptions import MlflowException

        with _explained(self.name):
            try:
                return _version(self._client.get_model_version_by_alias(self.name, alias))
            except MlflowException as error:
                if error.error_code in (_MISSING, "INVALID_PARAMETER_VALUE"):
                    return None
                raise

    def _create_from_record(self, uri: str, record: PromotionRecord, run_id: str | None) -> "ModelVersion":
        facts = {
            "model_uri": uri,
            "adapter_uri": _s3_address(record.adapter_uri),
            "base_model": record.base_model,
            "generation": record.generation,
            "data_fingerprint": record.data_fingerprint,
            "metric": record.metric,
            "metrics": json.dumps(record.metrics),
            "gate": record.reason,
            "compared_with": record.champion or "no champion",
        }
        return self._create(
            self.name,
            model_description=_MODEL_DESCRIPTION.format(name=self.name),
            source=self._source(uri),
            run_id=run_id,
            tags={f"{_TAG}{name}": value for name, value in facts.items()},
            description=f"MiniCPM-V {record.generation} tuned from {record.base_model}: {record.reason}.",
        )

    def _source(self, uri: str) -> str:
        # A server refuses local paths, which it would look up on its own disk; the tags hold the folder's real path.
        is_remote = environment.TRACKING_URI.read().startswith("http")
        return uri if storage.is_object_uri(uri) or not is_remote else f"folder:{uri}"

    def _create(self, name: str, model_description: str, **version: Any) -> "ModelVersion":
        """Create a version, after the registered model itself if this is its first version."""
        from mlflow.exceptions import MlflowException

        try:
            return self._client.create_model_version(name, **version)
        except MlflowException as error:
            if error.error_code != _MISSING:
                raise
        try:
            self._client.create_registered_model(name, description=model_description)
        except MlflowException as error:
            # Another process may have created it first.
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        return self._client.create_model_version(name, **version)


def _line_of_champions(moves: list[Move]) -> list[str]:
    """The champions that led to the present one, oldest first, without those that were rolled back."""
    line = [moves[0].previous] if moves and moves[0].previous else []
    for move in moves:
        if move.kind == "rollback" and len(line) > 1:
            line.pop()
        else:
            line.append(move.version)
    return line


def _version(entry: "ModelVersion") -> Version:
    facts = {
        key: entry.tags.get(f"{_TAG}{key}", "") for key in ("adapter_uri", "base_model", "data_fingerprint", "gate")
    }
    uri = entry.tags.get(f"{_TAG}model_uri") or str(entry.source)
    return Version(number=str(entry.version), uri=uri, **facts)


def _s3_address(uri: str) -> str:
    """The same address with `s3://` in place of `minio://`, which only Kubeflow understands."""
    return f"s3://{uri.removeprefix('minio://')}" if uri.startswith("minio://") else uri


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn MLflow's exceptions into the project's two kinds of errors."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        # Cut only after the password is removed: half of an address is not recognized as one.
        reason = (without_password(str(error)).strip() or type(error).__name__).splitlines()[0][:300]
        if error.error_code == _MISSING:
            raise UserError(f"{name}: {reason}; see the models on MLflow's page.") from error
        if error.error_code in _FORBIDDEN:
            raise UserError(
                f"{name}: MLflow refuses ({reason}); check MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."
            ) from error
        if error.error_code in _INVALID:
            raise UserError(f"{name}: MLflow refuses ({reason}); correct the name or the address.") from error
        raise RetryableError(_not_answering(reason)) from error
    except OSError as error:
        raise RetryableError(_not_answering(str(error))) from error


def _not_answering(reason: str) -> str:
    return f"{environment.TRACKING_URI.read()}: the model registry does not answer ({reason}); try again."
