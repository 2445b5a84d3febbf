"""Stream the items of a data file of any size.

Python's own JSON decoder parses each item inside a window of the text; more text is read only when the item is not
complete in the window. So memory is bounded by the longest sample, every error has its line and column, and the
accepted syntax is that of `json.loads`. (The streaming parser ijson silently turns half of a surrogate pair into a
question mark, and its errors have no line.)
"""

import codecs
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from minicpmv_finetune import storage
from minicpmv_finetune.errors import UserError

from . import image_files
from .other_formats import kind_of
from .samples import SampleError

_CHUNK = 1 << 18  # bytes read at once, at least
LONGEST_SAMPLE = 1 << 27  # characters; otherwise a file with an unclosed quote would be read completely
_LONGEST_TOKEN = 16  # characters; no JSON token that a window's end may cut is longer, except numbers and strings
_SPACE = " \t\n\r"


class _Decoder:
    """Python's JSON decoder, which also notes the keys that an object has twice; of their values it keeps the last."""

    def __init__(self) -> None:
        self._doubled: list[str] = []
        self._decoder = json.JSONDecoder(object_pairs_hook=self._make_object)

    def decode(self, text: str, position: int) -> tuple[Any, int, SampleError | None]:
        """Parse the value at a position; returns it, the position after it, and what is wrong with its keys."""
        self._doubled.clear()
        value, end = self._decoder.raw_decode(text, position)
        return value, end, self._problem()

    def decode_line(self, line: str) -> tuple[Any, SampleError | None]:
        """Parse a line that contains one value; returns it, and what is wrong with its keys."""
        self._doubled.clear()
        return self._decoder.decode(line), self._problem()

    def _make_object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            self._doubled += (key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        return content

    def _problem(self) -> SampleError | None:
        if not self._doubled:
            return None
        names = ", ".join(repr(key[:100]) for key in dict.fromkeys(self._doubled))
        return SampleError(
            "doubled_key",
            f"an object has the key {names:.300} more than once; keep one, or name images <image_00>, <image_01>.",
        )


@dataclass(frozen=True)
class Record:
    """One item of a data file: parsed JSON, or the reason why it could not be parsed.

    Attributes:
        file: URI of the file.
        index: Position among the items of the file, from 0.
        line: Line of the file, from 1, that could not be parsed.
        content: The parsed JSON.
        problem: The reason why the item could not be parsed, or cannot be used.
        is_last: Whether the rest of the file cannot be read because of the problem.
        length: Number of characters of the item in the file.
    """

    file: str
    index: int | None
    line: int | None
    content: Any
    problem: SampleError | None = None
    is_last: bool = False
    length: int = 0


def require_data_file(uri: str) -> None:
    """Refuse a folder in place of a data file; whether the file is there is not checked.

    Raises:
        UserError: The URI names a folder, or access is denied.
        RetryableError: The store does not answer.
    """
    if storage.is_folder(uri):
        raise UserError(f"{uri}: is a folder; name its data files, such as '{storage.join(uri, '*.jsonl')}'.")


def require_source(pattern: str) -> None:
    """Refuse a name or pattern of data files that leads to none, before anything is written.

    Raises:
        UserError: There is no such file, it is a folder, or access is denied.
        RetryableError: The store does not answer.
    """
    first = storage.expand(pattern)[0]
    require_data_file(first)
    storage.size(first)


def local_copy(uri: str) -> Path:
    """A data file on this machine, because no store keeps a stream open while images are checked for hours.

    Raises:
        UserError: There is no file at the URI, or access is denied.
        RetryableError: The store does not answer.
    """
    require_data_file(uri)
    if storage.is_object_uri(uri):
        return storage.fetch(uri)
    with storage.open_stream(uri):  # raises if the file cannot be read
        return Path(uri).expanduser()


def read_records(uri: str, path: Path, report_bytes: Callable[[int], object] = lambda count: None) -> Iterator[Record]:
    """The items of a JSON array, of JSON Lines or of `{"data": […]}`.

    Args:
        uri: URI of the file, for messages.
        path: Path of the file on this machine.
        report_bytes: Called with the number of bytes after each read.

    Raises:
        UserError: The file is not UTF-8, or contains neither of these formats.
    """
    with path.open("rb") as file:
        start = file.read(256)
        file.seek(0)
        other = None if start.lstrip()[:1] in (b"[", b"{") else image_files.explain_content(start)
        if other:
            raise UserError(
                f"{uri}: not JSON, it is {other}; give JSON or JSON Lines, which `minicpmv-finetune import-data` makes "
                "of other programs' data."
            )
        window = _Window(uri, file, report_bytes)
        first = window.peek()
        if not first:
            yield _empty(uri, "the file is empty; write samples into it.")
        elif first == "[":
            yield from _items(window, then=_expect_end)
        elif first == "{":
            yield from _document_or_lines(window)
        else:
            window.hold()
            try:
                kind = kind_of(window.value())
                _expect_end(window)
            except _InvalidJsonError:
                window.rewind()
                yield from _lines(window)
            else:
                raise UserError(f"{uri}: contains {kind}, not an array of samples; see docs/data-format.md.")


class _InvalidJsonError(Exception):
    """The text is not valid JSON at some position."""

    def __init__(self, message: str, line: int, column: int | None) -> None:
        super().__init__(message, line, column)
        place = f"line {line}" if column is None else f"line {line}, column {column}"
        self.line = line
        self.problem = SampleError("invalid_json", f"invalid JSON at {place} ({message}); correct it there.")


class _Window:
    """The part of a file's text that is being parsed.

    Attributes:
        uri: URI of the file, for messages.
        text: The part of the text. `extend` reads more of the file and drops the text before `position`; after a call
            of `hold`, it drops nothing behind the held position.
        position: Index in `text` up to which it is parsed.
        dropped: Number of characters of the file before `text`.
        has_ended: Whether `text` reaches the end of the file.
        problem: What is wrong with the keys of the value that was parsed last.
    """

    def __init__(self, uri: str, file: BinaryIO, report_bytes: Callable[[int], object]) -> None:
        self.uri = uri
        self.text = ""
        self.position = 0
        self.dropped = 0
        self.has_ended = False
        self.problem: SampleError | None = None
        self._json = _Decoder()
        self._held: int | None = None
        self._file, self._report_bytes = file, report_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._bytes = 0  # read from the file so far
        self._lines = 0  # number of line ends before `text`
        self._columns = 0  # number of characters before `text` in its first line

    def hold(self) -> None:
        """Keep the text from the current position until `rewind` or `release`."""
        self._held = self.position

    def release(self) -> None:
        """Allow the held text to be dropped."""
        self._held = None

    def rewind(self) -> None:
        """Go back to the held position, and allow the text to be dropped."""
        if self._held is not None:
            self.position, self._held = self._held, None

    def extend(self) -> None:
        """Read more text: at least as much as is kept, so that parsing again costs only a constant factor."""
        keep = self.position if self._held is None else self._held
        if len(self.text) - keep > LONGEST_SAMPLE:
            raise self.error(f"a sample of more than {LONGEST_SAMPLE:,} characters", keep)
        dropped = self.text[:keep]
        if newlines := dropped.count("\n"):
            self._lines += newlines
            self._columns = 0
        self._columns += len(dropped) - (dropped.rfind("\n") + 1)
        content = self._file.read(max(_CHUNK, len(self.text) - keep))
        self._report_bytes(len(content))
        self.has_ended = not content
        pending = len(self._decoder.getstate()[0])
        try:
            text = self._decoder.decode(content, final=self.has_ended)
        except UnicodeDecodeError as error:
            byte = self._bytes - pending + error.start
            raise UserError(f"{self.uri}: not UTF-8 text (byte {byte}); save it as UTF-8 JSON.") from error
        if not self._bytes:
            text = text.removeprefix("\ufeff")
        self._bytes += len(content)
        self.text = self.text[keep:] + text
        self.dropped += keep
        self.position -= keep
        if self._held is not None:
            self._held = 0

    def peek(self) -> str:
        """The next character that is not white space, without stepping over it; empty at the end of the file."""
        while True:
            while self.position < len(self.text):
                if self.text[self.position] not in _SPACE:
                    return self.text[self.position]
                self.position += 1
            if self.has_ended:
                return ""
            self.extend()

    def take(self, wanted: str, message: str) -> None:
        """Step over the character `wanted`, which must come next; `message` is the error otherwise."""
        if self.peek() != wanted:
            raise self.error(message, self.position)
        self.position += 1

    def value(self) -> Any:
        """Parse the next JSON value and step over it."""
        self.peek()
        while True:
            try:
                value, end, self.problem = self._json.decode(self.text, self.position)
            except json.JSONDecodeError as error:
                # The value may continue behind the window's end. The position of an unclosed string is its start.
                is_cut = error.msg.startswith("Unterminated") or error.pos > len(self.text) - _LONGEST_TOKEN
                if self.has_ended or not is_cut:
                    raise self.error(error.msg, error.pos) from error
            except (ValueError, RecursionError) as error:
                raise self.error(str(error), self.position) from error
            else:
                if end + 2 < len(self.text) or self.has_ended:  # nearer to the end, a number may be cut, as in `1e-`
                    self.position = end
                    return value
            self.extend()

    def line(self) -> str | None:
        """Return the rest of the line and step over it; None at the end of the file."""
        start = self.position
        while (end := self.text.find("\n", start)) < 0 and not self.has_ended:
            start = len(self.text) - self.position
            self.extend()
        if end < 0:
            end = len(self.text)
            if self.position == end:
                return None
        # Not str.splitlines, which also splits at characters that JSON allows within a string, such as U+2028.
        line = self.text[self.position : end]
        self.position = end + 1 if end < len(self.text) else end
        return line

    def line_number(self, position: int) -> int:
        """The line of the file, from 1, that contains a position of the text."""
        return self._lines + self.text.count("\n", 0, position) + 1

    def error(self, message: str, position: int) -> _InvalidJsonError:
        """The error for invalid JSON at a position of the text."""
        before = self.text.rfind("\n", 0, position)
        column = position - before if before >= 0 else self._columns + position + 1
        return _InvalidJsonError(message, self.line_number(position), column)


def _items(window: _Window, then: Callable[[_Window], None]) -> Iterator[Record]:
    """The items of the array at the current position; `then` parses the text after the array."""
    index = 0
    try:
        window.take("[", "Expecting value")
        if window.peek() == "]":
            window.position += 1
            then(window)
            yield _empty(window.uri, "the array is empty; write samples into it.")
            return
        while True:
            window.peek()
            before = window.dropped + window.position
            item = window.value()
            length = window.dropped + window.position - before
            yield Record(window.uri, index, None, item, window.problem, length=length)
            index += 1
            if window.peek() == "]":
                break
            window.take(",", "Expecting ',' delimiter")
        window.position += 1
        then(window)
    except _InvalidJsonError as error:
        yield Record(window.uri, None, error.line, None, error.problem, is_last=True)


def _expect_end(window: _Window) -> None:
    if window.peek():
        raise window.error("Extra data", window.position)


def _finish_object(window: _Window) -> None:
    """Parse the members that follow the samples in `{"data": […], …}`."""
    while window.peek() == ",":
        window.position += 1
        if _key(window) == "data":
            raise window.error("data occurs twice, and only its first samples would be used", window.position)
        window.value()
    window.take("}", "Expecting ',' delimiter")
    _expect_end(window)


def _document_or_lines(window: _Window) -> Iterator[Record]:
    """The items of `{"data": […]}`, one sample, or JSON Lines, which the first object decides."""
    window.hold()
    try:
        if _enter_data(window):
            window.release()
            yield from _items(window, then=_finish_object)
            return
        is_whole = not window.peek()
    except _InvalidJsonError as error:
        if _is_one_document(window):
            yield Record(window.uri, None, error.line, None, error.problem, is_last=True)
            return
        is_whole = False
    window.rewind()
    if is_whole:
        content = window.value()
        yield Record(window.uri, 0, None, content, window.problem)
    else:
        yield from _lines(window)


def _enter_data(window: _Window) -> bool:
    """Step to the samples of `{"data": […]}`; for an object without them, step over it and return False."""
    window.take("{", "Expecting value")
    if window.peek() == "}":
        window.position += 1
        return False
    while True:
        if _key(window) == "data" and window.peek() == "[":
            return True
        window.value()
        if window.peek() == "}":
            window.position += 1
            return False
        window.take(",", "Expecting ',' delimiter")


def _key(window: _Window) -> str:
    if window.peek() != '"':
        raise window.error("Expecting property name enclosed in double quotes", window.position)
    key = window.value()
    window.take(":", "Expecting ':' delimiter")
    return str(key)


def _is_one_document(window: _Window) -> bool:
    """Whether invalid JSON was meant as one document, not as JSON Lines.

    In one document, the first line is incomplete, and the second line alone is not a sample.
    """
    window.rewind()
    window.hold()
    first = (window.line() or "").rstrip()
    try:
        json.loads(first)
        return False
    except json.JSONDecodeError as error:
        if error.pos != len(first):
            return False
    except (ValueError, RecursionError):
        return False
    window.peek()
    try:
        return not isinstance(json.loads(window.line() or ""), dict)
    except (ValueError, RecursionError):
        return True


def _lines(window: _Window) -> Iterator[Record]:
    index = 0
    decoder = _Decoder()
    number = window.line_number(window.position)
    while True:
        try:
            line = window.line()
        except _InvalidJsonError as error:
            yield Record(window.uri, index, number, None, error.problem, is_last=True)
            return
        if line is None:
            return
        if line.strip():
            try:
                content, doubled = decoder.decode_line(line)
                yield Record(window.uri, index, number, content, doubled, length=len(line))
            except json.JSONDecodeError as error:
                problem = _InvalidJsonError(error.msg, number, error.colno).problem
                yield Record(window.uri, index, number, None, problem)
            except (ValueError, RecursionError) as error:
                yield Record(window.uri, index, number, None, _InvalidJsonError(str(error), number, None).problem)
            index += 1
        number += 1


def _empty(uri: str, message: str) -> Record:
    return Record(uri, None, 1, None, SampleError("empty_file", message))
