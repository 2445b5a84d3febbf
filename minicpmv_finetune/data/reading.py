"""The items of a data file, one after the other, however large the file is.

Python's own JSON decoder parses each item where it stands in a window onto the text, which is read on only when an
item is not all there. So memory is bounded by the longest sample, every error has its line and column, and what is
accepted is what `json.loads` accepts. (Of the streaming parsers, ijson turns half of a surrogate pair into a question
mark without a word, and names no line.)
"""

import codecs
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from minicpmv_finetune.errors import UserError

from .samples import SampleError

_CHUNK = 1 << 18  # bytes read at once, at least
LONGEST_SAMPLE = 1 << 27  # characters; a file whose quotes do not close would else be read whole
_LONGEST_TOKEN = 16  # characters; the longest token of JSON that a window's end may cut, but for numbers and strings
_DECODER = json.JSONDecoder()
_SPACE = " \t\n\r"


@dataclass(frozen=True)
class Record:
    """One item of a data file: parsed JSON, or why it could not be parsed.

    Attributes:
        file: URI of the file.
        index: position among its items, from 0.
        line: line from 1, where it could not be parsed.
        content: the parsed JSON.
        problem: why there is none.
        is_last: whether the problem keeps the rest of the file from being read.
        length: characters of the item in the file.
    """

    file: str
    index: int | None
    line: int | None
    content: Any
    problem: SampleError | None = None
    is_last: bool = False
    length: int = 0


def read_records(uri: str, path: Path, read: Callable[[int], object] = lambda count: None) -> Iterator[Record]:
    """The items of a JSON array, of JSON Lines or of `{"data": […]}`.

    Args:
        uri: how messages name the file.
        path: where it lies.
        read: told the number of bytes whenever some were read.

    Raises:
        UserError: it is not UTF-8, or holds something else.
    """
    with path.open("rb") as file:
        window = _Window(uri, file, read)
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
                kind = type(window.value()).__name__
                _expect_end(window)
            except _BrokenError:
                window.rewind()
                yield from _lines(window)
            else:
                raise UserError(f"{uri}: holds {kind}, not an array of samples; see docs/data-format.md.")


class _BrokenError(Exception):
    """The text is no JSON at a place."""

    def __init__(self, message: str, line: int, column: int | None) -> None:
        super().__init__(message, line, column)
        place = f"line {line}" if column is None else f"line {line}, column {column}"
        self.line = line
        self.problem = SampleError("invalid_json", f"invalid JSON at {place} ({message}); correct it there.")


class _Window:
    """The part of a file's text that is being parsed.

    Attributes:
        text: that part; read on by `more`, which drops what lies before `place`, or from `hold` on nothing.
        place: how far it is parsed.
        dropped: characters of the file before the text.
        has_ended: whether the text reaches to the end of the file.
    """

    def __init__(self, uri: str, file: BinaryIO, read: Callable[[int], object]) -> None:
        self.uri = uri
        self.text = ""
        self.place = 0
        self.dropped = 0
        self.has_ended = False
        self._held: int | None = None
        self._file, self._read = file, read
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._bytes = 0
        self._lines = 0  # line ends before the text
        self._columns = 0  # characters of the text's first line before it

    def hold(self) -> None:
        """Keep the text from here on, until `rewind` or `release`."""
        self._held = self.place

    def release(self) -> None:
        """Keep it no longer."""
        self._held = None

    def rewind(self) -> None:
        """Go back to where it was held, and keep it no longer."""
        if self._held is not None:
            self.place, self._held = self._held, None

    def more(self) -> None:
        """Read on: at least as much again as there is, so that retrying costs a constant factor."""
        keep = self.place if self._held is None else self._held
        if len(self.text) - keep > LONGEST_SAMPLE:
            raise self.broken(f"a sample of more than {LONGEST_SAMPLE:,} characters", keep)
        dropped = self.text[:keep]
        if newlines := dropped.count("\n"):
            self._lines += newlines
            self._columns = 0
        self._columns += len(dropped) - (dropped.rfind("\n") + 1)
        content = self._file.read(max(_CHUNK, len(self.text) - keep))
        self._read(len(content))
        self.has_ended = not content
        pending = len(self._decoder.getstate()[0])
        try:
            text = self._decoder.decode(content, final=self.has_ended)
        except UnicodeDecodeError as error:
            place = self._bytes - pending + error.start
            raise UserError(f"{self.uri}: not UTF-8 text (byte {place}); save it as UTF-8 JSON.") from error
        if not self._bytes:
            text = text.removeprefix("\ufeff")
        self._bytes += len(content)
        self.text = self.text[keep:] + text
        self.dropped += keep
        self.place -= keep
        if self._held is not None:
            self._held = 0

    def peek(self) -> str:
        """The next character that is no white space, left where it is; empty at the end of the file."""
        while True:
            while self.place < len(self.text):
                if self.text[self.place] not in _SPACE:
                    return self.text[self.place]
                self.place += 1
            if self.has_ended:
                return ""
            self.more()

    def take(self, wanted: str, message: str) -> None:
        """Step over a character that must come next."""
        if self.peek() != wanted:
            raise self.broken(message, self.place)
        self.place += 1

    def value(self) -> Any:
        """The next value, and step over it."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.place)
            except json.JSONDecodeError as error:
                # Behind the end of the window it might go on as it should; the place of an open string is its start.
                is_cut = error.msg.startswith("Unterminated") or error.pos > len(self.text) - _LONGEST_TOKEN
                if self.has_ended or not is_cut:
                    raise self.broken(error.msg, error.pos) from error
            except (ValueError, RecursionError) as error:
                raise self.broken(str(error), self.place) from error
            else:
                if end + 2 < len(self.text) or self.has_ended:  # before that, a number might go on, as `1e-` does
                    self.place = end
                    return value
            self.more()

    def line(self) -> str | None:
        """The rest of the line, and step over it; None at the end of the file."""
        start = self.place
        while (end := self.text.find("\n", start)) < 0 and not self.has_ended:
            start = len(self.text) - self.place
            self.more()
        if end < 0:
            end = len(self.text)
            if self.place == end:
                return None
        # Not str.splitlines: it also splits at characters that JSON allows within a string, such as U+2028.
        line = self.text[self.place : end]
        self.place = end + 1 if end < len(self.text) else end
        return line

    def line_number(self, place: int) -> int:
        """The line, from 1, that a place in the text is on."""
        return self._lines + self.text.count("\n", 0, place) + 1

    def broken(self, message: str, place: int) -> _BrokenError:
        """What to raise over the text at a place."""
        before = self.text.rfind("\n", 0, place)
        column = place - before if before >= 0 else self._columns + place + 1
        return _BrokenError(message, self.line_number(place), column)


def _items(window: _Window, then: Callable[[_Window], None]) -> Iterator[Record]:
    """The items of the array that begins here; `then` parses what follows it."""
    index = 0
    try:
        window.take("[", "Expecting value")
        if window.peek() == "]":
            window.place += 1
            then(window)
            yield _empty(window.uri, "the array is empty; write samples into it.")
            return
        while True:
            window.peek()
            before = window.dropped + window.place
            item = window.value()
            yield Record(window.uri, index, None, item, length=window.dropped + window.place - before)
            index += 1
            if window.peek() == "]":
                break
            window.take(",", "Expecting ',' delimiter")
        window.place += 1
        then(window)
    except _BrokenError as error:
        yield Record(window.uri, None, error.line, None, error.problem, is_last=True)


def _expect_end(window: _Window) -> None:
    if window.peek():
        raise window.broken("Extra data", window.place)


def _finish_object(window: _Window) -> None:
    """Parse the members that follow the samples in `{"data": […], …}`."""
    while window.peek() == ",":
        window.place += 1
        _key(window)
        window.value()
    window.take("}", "Expecting ',' delimiter")
    _expect_end(window)


def _document_or_lines(window: _Window) -> Iterator[Record]:
    """The items of `{"data": […]}`, one sample, or JSON Lines: the first object tells, and is kept until it does."""
    window.hold()
    try:
        if _enter_data(window):
            window.release()
            yield from _items(window, then=_finish_object)
            return
        is_whole = not window.peek()
    except _BrokenError as error:
        if _is_one_document(window):
            yield Record(window.uri, None, error.line, None, error.problem, is_last=True)
            return
        is_whole = False
    window.rewind()
    if is_whole:
        yield Record(window.uri, 0, None, window.value())
    else:
        yield from _lines(window)


def _enter_data(window: _Window) -> bool:
    """Step up to the samples of `{"data": […]}`; False behind the end of an object without them."""
    window.take("{", "Expecting value")
    if window.peek() == "}":
        window.place += 1
        return False
    while True:
        if _key(window) == "data" and window.peek() == "[":
            return True
        window.value()
        if window.peek() == "}":
            window.place += 1
            return False
        window.take(",", "Expecting ',' delimiter")


def _key(window: _Window) -> str:
    if window.peek() != '"':
        raise window.broken("Expecting property name enclosed in double quotes", window.place)
    key = window.value()
    window.take(":", "Expecting ':' delimiter")
    return str(key)


def _is_one_document(window: _Window) -> bool:
    """Whether broken JSON was meant as a whole, not as a line for each sample.

    Then its first line is unfinished, and the next is no sample by itself.
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
    number = window.line_number(window.place)
    while True:
        try:
            line = window.line()
        except _BrokenError as error:
            yield Record(window.uri, index, number, None, error.problem, is_last=True)
            return
        if line is None:
            return
        if line.strip():
            try:
                yield Record(window.uri, index, number, json.loads(line), length=len(line))
            except json.JSONDecodeError as error:
                problem = _BrokenError(error.msg, number, error.colno).problem
                yield Record(window.uri, index, number, None, problem)
            except (ValueError, RecursionError) as error:
                yield Record(window.uri, index, number, None, _BrokenError(str(error), number, None).problem)
            index += 1
        number += 1


def _empty(uri: str, message: str) -> Record:
    return Record(uri, None, 1, None, SampleError("empty_file", message))
