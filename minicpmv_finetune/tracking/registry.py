"""Which tuned models there are, which of them is champion, and how it came to be: MLflow's model registry.

Each model that passed the gate is a version registered by its address, with what is known of it in tags; the newest
has the alias `challenger`. The alias `champion` is what serving asks for.

**Two runs at once cannot both promote.** MLflow sets an alias whatever it was before, so the alias cannot decide.
What decides is a log that only grows: a second registered model, `NAME.moves`, whose versions are the moves. MLflow
numbers them one after the other, by a unique key of its database, and a move and its tags appear together. Each move
says after which one it was decided (`after`), and counts only if that one was the last that counts: of many that were
decided on the same champion, the first counts, and all who read the log agree on that. So the number of a move is
its fencing token, and a decision has expired as soon as another counts. No lock is held that a killed process could
leave behind.

The alias follows the log: whoever sets it looks again afterwards, and sets it anew if the log has grown. Only a process
that is killed between the two can leave an older champion there; whoever next reads the champion mends that.
Hence `champion` is moved by `minicpmv-finetune promote` and `rollback`, not by hand in MLflow.
"""

import json
import random
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minicpmv_finetune import environment, storage
from minicpmv_finetune.errors import RetryableError, UserError

from .promotion_record import PromotionRecord
from .step_runs import mlflow_client, without_password

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHAMPION, CHALLENGER = "champion", "challenger"
_TAG = "minicpmv."
_MOVES = ".moves"
_ATTEMPTS = 6  # to write a move that others write at the same time
_LONGEST_WAIT = 2.0  # seconds between them
_FORBIDDEN = {"PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"}
_WRONG = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "INVALID_STATE"}
_MISSING = "RESOURCE_DOES_NOT_EXIST"


@dataclass(frozen=True)
class Version:
    """A registered model.

    Attributes:
        number: MLflow's, from 1.
        uri: where the merged folder lies.
        adapter_uri: where what was trained lies; empty if unknown.
        base_model: it was tuned from, as the user gave it.
        data_fingerprint: of the data it was tuned and evaluated on.
        gate: what the gate said.
    """

    number: str
    uri: str
    adapter_uri: str
    base_model: str
    data_fingerprint: str
    gate: str


@dataclass(frozen=True)
class Move:
    """A change of the champion that counts.

    Attributes:
        number: place in the log; grows with every move.
        version: the champion from then on.
        previous: the one before; empty when there was none.
        kind: "promotion" or "rollback".
        reason: in words.
        claim: whose move it is, so that a retry recognises its own.
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
    """Whether there is a registry to ask."""
    return bool(environment.TRACKING_URI.read())


def open_registry(name: str) -> "Registry":
    """The versions registered under a name, once the server has answered.

    Raises:
        UserError: no server is named, or it refuses.
        RetryableError: the server does not answer.
    """
    if not is_configured():
        raise UserError(
            f"{environment.TRACKING_URI} is not set, so there is no model registry; set it to MLflow's address."
        )
    if not name.strip() or any(mark in name for mark in "'/:"):
        raise UserError(f"registered_model: {name!r} cannot name a model in MLflow; use letters, digits and dashes.")
    registry = Registry(name, mlflow_client())
    registry.check()
    return registry


def champion_of(name: str) -> Version | None:
    """The champion of a registered model; none without a name, a server or a champion.

    Raises:
        UserError: the server refuses.
        RetryableError: the server does not answer.
    """
    return open_registry(name).champion() if name and is_configured() else None


def champion_to_beat(name: str) -> Version | None:
    """The champion, if there is one, whose folder has been seen to be there still.

    Raises:
        UserError: it is gone, or the server refuses.
        RetryableError: the server or the store does not answer.
    """
    champion = champion_of(name)
    if champion is not None and not storage.list_files(champion.uri):
        raise UserError(
            f"{champion.uri}: version {champion.number} of {name} is champion, but its folder is gone; promote a "
            "version that is still there, or give another registered_model."
        )
    return champion


class Registry:
    """The versions of one registered model. Every method may raise `UserError` or `RetryableError`."""

    def __init__(self, name: str, client: "MlflowClient") -> None:
        self.name = name
        self._client = client

    def check(self) -> None:
        """See whether the server answers, before any work that needs it."""
        with _explained(self.name):
            self._client.search_registered_models(max_results=1)

    def champion(self) -> Version | None:
        """The version whose turn it is; none when nothing was ever promoted."""
        moves = self.moves()
        if not moves:
            return self._aliased(CHAMPION)
        self._follow()
        return self.version(moves[-1].version)

    def version(self, number: str) -> Version:
        """A version by its number."""
        with _explained(self.name):
            return _version(self._client.get_model_version(self.name, number))

    def register(self, verdict: PromotionRecord, run_id: str | None = None) -> Version:
        """Register a model, or find it registered already; it becomes the challenger.

        Args:
            verdict: what evaluation found.
            run_id: of the MLflow run that registers it.
        """
        uri = _address(verdict.model_uri)
        with _explained(self.name):
            known = [one for one in self._versions(self.name) if one.tags.get(f"{_TAG}model_uri") == uri]
            entry = known[-1] if known else self._keep(uri, verdict, run_id)
            self._client.set_registered_model_alias(self.name, CHALLENGER, entry.version)
            return _version(entry)

    def promote(self, number: str, over: str | None, reason: str, claim: str = "") -> Move:
        """Make a version champion.

        Args:
            number: of the version.
            over: the champion that it was found better than, empty for none; `None` whatever the champion is.
            reason: in words.
            claim: the same for a retry of the same promotion, such as a pipeline run's id; by default every call is
                a promotion of its own.

        Raises:
            OvertakenError: the champion is another than `over`.
        """
        self.version(number)
        moves = self.moves()
        done = [move for move in moves if claim and move.claim == claim]
        if moves and moves[-1].version == number:
            done = moves[-1:]
        if done:
            self._settle(done[-1])
            return done[-1]
        if over is not None and over != self._holder(moves):
            raise OvertakenError(self._holder(moves))
        return self._move(moves, number, "promotion", reason, claim)

    def rollback(self, reason: str) -> Move:
        """Make the champion's predecessor champion again; repeated, the one before that.

        Raises:
            OvertakenError: the champion has moved in this moment.
        """
        moves = self.moves()
        line = _line(moves)
        if len(line) < 2:
            raise UserError(f"{self.name}: no champion came before the present one; promote a version instead.")
        return self._move(moves, line[-2], "rollback", reason)

    def moves(self) -> list[Move]:
        """The moves that count, oldest first."""
        with _explained(self.name):
            entries = self._versions(f"{self.name}{_MOVES}")
        counting: list[Move] = []
        for entry in entries:
            if int(entry.tags.get("after", -1)) == (counting[-1].number if counting else 0):
                told = {key: entry.tags.get(key, "") for key in ("version", "previous", "kind", "reason", "claim")}
                counting.append(Move(number=int(entry.version), **told))
        return counting

    def _holder(self, moves: list[Move]) -> str:
        if moves:
            return moves[-1].version
        champion = self._aliased(CHAMPION)
        return champion.number if champion else ""

    def _move(self, moves: list[Move], number: str, kind: str, reason: str, claim: str = "") -> Move:
        """Write a move that counts, or find out that another was faster."""
        claim = claim or uuid.uuid4().hex
        after = moves[-1].number if moves else 0
        tags = {"version": number, "previous": self._holder(moves), "kind": kind, "reason": reason, "claim": claim}
        for attempt in range(_ATTEMPTS):
            failure: RetryableError | None = None
            try:
                self._write_move({**tags, "after": str(after)})
            except RetryableError as error:
                # It may have been written all the same; the log tells.
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
        raise RetryableError(f"{self.name}: MLflow did not keep the move to version {number}; try again.")

    def _write_move(self, tags: Mapping[str, str]) -> None:
        log = f"{self.name}{_MOVES}"
        with _explained(self.name):
            self._create(
                log,
                about=f"Every move of the champion of {self.name}, in order. Do not edit.",
                source=f"models:/{self.name}/{tags['version']}",
                tags=dict(tags),
                description=f"{tags['kind']} of version {tags['version']}: {tags['reason']}",
            )

    def _settle(self, move: Move) -> None:
        """Let alias and tags say what the log says; again and again does no harm."""
        self._follow()
        with _explained(self.name):
            told = f"{move.kind}: {move.reason}"
            self._client.set_model_version_tag(self.name, move.version, f"{_TAG}{CHAMPION}", told)
            if move.previous and move.previous != move.version:
                replaced = f"{move.kind} of version {move.version}: {move.reason}"
                self._client.set_model_version_tag(self.name, move.previous, f"{_TAG}replaced_by", replaced)

    def _follow(self) -> None:
        """Set the alias to the log's last champion, until the log stands still."""
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

    def _keep(self, uri: str, verdict: PromotionRecord, run_id: str | None) -> "ModelVersion":
        facts = {
            "model_uri": uri,
            "adapter_uri": _address(verdict.adapter_uri),
            "base_model": verdict.base_model,
            "generation": verdict.generation,
            "data_fingerprint": verdict.data_fingerprint,
            "metric": verdict.metric,
            "metrics": json.dumps(verdict.metrics),
            "gate": verdict.reason,
            "compared_with": verdict.champion or "no champion",
        }
        return self._create(
            self.name,
            about="",
            source=self._source(uri),
            run_id=run_id,
            tags={f"{_TAG}{name}": value for name, value in facts.items()},
            description=f"MiniCPM-V {verdict.generation} tuned from {verdict.base_model}: {verdict.reason}.",
        )

    def _source(self, uri: str) -> str:
        # A server refuses paths, which it takes for its own; where the folder lies for us is in the tags.
        is_remote = environment.TRACKING_URI.read().startswith("http")
        return uri if storage.is_object_uri(uri) or not is_remote else f"folder:{uri}"

    def _create(self, name: str, about: str, **version: Any) -> "ModelVersion":
        """Create a version, and first the registered model if this is the first one."""
        from mlflow.exceptions import MlflowException

        try:
            return self._client.create_model_version(name, **version)
        except MlflowException as error:
            if error.error_code != _MISSING:
                raise
        try:
            self._client.create_registered_model(name, description=about)
        except MlflowException as error:
            # Another process was faster.
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        return self._client.create_model_version(name, **version)

    def _versions(self, name: str) -> list["ModelVersion"]:
        """All versions of a registered model, oldest first; none when there is no such model."""
        found: list[ModelVersion] = []
        token = None
        while True:
            page = self._client.search_model_versions(f"name = '{name}'", max_results=1000, page_token=token)
            found += page
            token = page.token
            if not token:
                return sorted(found, key=lambda version: int(version.version))


def _line(moves: list[Move]) -> list[str]:
    """The champions that led to the present one, oldest first: what was rolled back is not among them."""
    line = [moves[0].previous] if moves and moves[0].previous else []
    for move in moves:
        if move.kind == "rollback" and len(line) > 1:
            line.pop()
        else:
            line.append(move.version)
    return line


def _version(entry: "ModelVersion") -> Version:
    told = {
        key: entry.tags.get(f"{_TAG}{key}", "") for key in ("adapter_uri", "base_model", "data_fingerprint", "gate")
    }
    uri = entry.tags.get(f"{_TAG}model_uri") or str(entry.source)
    return Version(number=str(entry.version), uri=uri, **told)


def _address(uri: str) -> str:
    """`s3://`, which others than Kubeflow understand too."""
    return f"s3://{uri.removeprefix('minio://')}" if uri.startswith("minio://") else uri


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn MLflow's exceptions into the project's two kinds."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        reason = (without_password(str(error)).strip() or type(error).__name__).splitlines()[0][:300]
        if error.error_code == _MISSING:
            raise UserError(f"{name}: {reason}; see MLflow's page of models for what there is.") from error
        if error.error_code in _FORBIDDEN:
            raise UserError(
                f"{name}: MLflow refuses ({reason}); check MLFLOW_TRACKING_USERNAME and -PASSWORD."
            ) from error
        if error.error_code in _WRONG:
            raise UserError(f"{name}: MLflow refuses ({reason}); correct the name or the address.") from error
        raise RetryableError(f"{_server()}: the model registry does not answer ({reason}); try again.") from error
    except OSError as error:
        raise RetryableError(f"{_server()}: the model registry does not answer ({error}); try again.") from error


def _server() -> str:
    return without_password(environment.TRACKING_URI.read())
