"""TEDS: the similarity of two tables in HTML, by the edit distance of their trees.

Defined by Zhong, ShafieiBavani and Jimeno Yepes, "Image-based table recognition" (ECCV 2020); computed here by the
algorithm of Zhang and Shasha (1989), whose distance is the same as that of the APTED algorithm in the published code.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser

from rapidfuzz.distance import Levenshtein

_EMPTY_TAGS = frozenset({"area", "br", "col", "hr", "img", "input", "link", "meta", "wbr"})
_LONGEST_SPAN = 5  # digits; browsers read at most 1000 columns and 65534 rows
_ENDED_BY = {
    "td": {"td", "th"},
    "th": {"td", "th"},
    "tr": {"td", "th", "tr"},
    "thead": {"td", "th", "tr", "thead", "tbody", "tfoot", "caption", "colgroup"},
}
_ENDED_BY |= {"tbody": _ENDED_BY["thead"], "tfoot": _ENDED_BY["thead"]}
"""Elements that a start tag ends when their own end tags are left out."""


@dataclass
class _Element:
    """An element of an HTML document; `parts` are its texts and elements in order."""

    tag: str
    attributes: dict[str, str | None] = field(default_factory=dict)
    parts: "list[_Element | str]" = field(default_factory=list)

    @property
    def children(self) -> "list[_Element]":
        return [part for part in self.parts if isinstance(part, _Element)]


@dataclass(frozen=True)
class _Node:
    """A node of the compared trees.

    Attributes:
        label: Tag, and for cells the columns and rows that they span.
        content: Characters and tags in a cell; empty for other nodes.
        leftmost: Place, in postorder, of the first leaf below this node.
    """

    label: tuple[str, int, int]
    content: tuple[str, ...]
    leftmost: int


def table_similarity(answer: str, expected: str) -> float:
    """1 - edit distance / nodes of the larger table; 0 without a table. The first table of each text counts.

    Inserting or removing a node costs 1, and so does another tag, colspan or rowspan. Cells that differ only in their
    content cost the normalized edit distance of the characters and tags in them.
    """
    given, right = find_table(answer), find_table(expected)
    if given is None or right is None:
        return 0.0
    nodes = max(_count_below(given), _count_below(right))
    if not nodes:
        return 1.0
    return 1 - _tree_distance(_postorder(given), _postorder(right)) / nodes


def find_table(text: str) -> _Element | None:
    """The first table in a text, or None."""
    reader = _Reader()
    reader.feed(text)
    reader.close()
    return reader.table


class _Reader(HTMLParser):
    """Collects the first table of a document; forgives end tags that are left out, as browsers do."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.table: _Element | None = None
        self._open: list[_Element] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if not self._open and (tag != "table" or self.table is not None):
            return
        if ended := _ENDED_BY.get(tag):
            inner = max((place for place, element in enumerate(self._open) if element.tag == "table"), default=-1)
            for place in range(inner + 1, len(self._open)):
                if self._open[place].tag in ended:
                    del self._open[place:]
                    break
        element = _Element(tag, dict(attrs))
        if self._open:
            self._open[-1].parts.append(element)
        else:
            self.table = element
        if tag not in _EMPTY_TAGS:
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        for place in range(len(self._open) - 1, -1, -1):
            if self._open[place].tag == tag:
                del self._open[place:]
                return

    def handle_data(self, data: str) -> None:
        if self._open:
            self._open[-1].parts.append(data)


def _count_below(element: _Element) -> int:
    """The number of elements below an element; those in cells count too."""
    found = element.children
    for inner in found:  # grows on the way
        found += inner.children
    return len(found)


def _postorder(element: _Element) -> list[_Node]:
    """The nodes of a table's tree, children before their parents; what is in a cell is its content."""
    nodes: list[_Node] = []

    def add(element: _Element) -> None:
        first = len(nodes)
        if element.tag == "td":
            spans = (_span(element, "colspan"), _span(element, "rowspan"))
            nodes.append(_Node(("td", *spans), tuple(_tokens(element)), first))
            return
        for child in element.children:
            add(child)
        nodes.append(_Node((element.tag, 0, 0), (), first))

    add(element)
    return nodes


def _span(element: _Element, name: str) -> int:
    value = (element.attributes.get(name) or "").strip()
    return int(value) if value.isdecimal() and len(value) <= _LONGEST_SPAN else 1


def _tokens(element: _Element) -> list[str]:
    """The content of an element: each character, and the tags around it."""
    tokens: list[str] = []
    for part in element.parts:
        tokens += part if isinstance(part, str) else [f"<{part.tag}>", *_tokens(part), f"</{part.tag}>"]
    return tokens


def _tree_distance(one: Sequence[_Node], other: Sequence[_Node]) -> float:
    """The edit distance of two ordered trees (Zhang and Shasha 1989), given in postorder."""
    distance = [[0.0] * len(other) for _ in one]
    renaming = [[_renaming_cost(a, b) for b in other] for a in one]
    for root in _key_roots(one):
        for other_root in _key_roots(other):
            _fill(distance, renaming, one, other, root, other_root)
    return distance[-1][-1]


def _key_roots(nodes: Sequence[_Node]) -> list[int]:
    """For each first leaf, the highest node above it."""
    return sorted({node.leftmost: place for place, node in enumerate(nodes)}.values())


def _fill(
    distance: list[list[float]],
    renaming: Sequence[Sequence[float]],
    one: Sequence[_Node],
    other: Sequence[_Node],
    root: int,
    other_root: int,
) -> None:
    """Fill in the distances of all subtrees that begin with the same leaves as two key roots."""
    start, other_start = one[root].leftmost, other[other_root].leftmost
    rows, columns = root - start + 2, other_root - other_start + 2
    forest = [[0.0] * columns for _ in range(rows)]
    for row in range(1, rows):
        forest[row][0] = row
    forest[0] = [float(column) for column in range(columns)]
    for row in range(1, rows):
        node = start + row - 1
        before = one[node].leftmost - start
        for column in range(1, columns):
            other_node = other_start + column - 1
            other_before = other[other_node].leftmost - other_start
            cheapest = min(forest[row - 1][column], forest[row][column - 1]) + 1
            if before == 0 and other_before == 0:
                cheapest = min(cheapest, forest[row - 1][column - 1] + renaming[node][other_node])
                distance[node][other_node] = cheapest
            else:
                cheapest = min(cheapest, forest[before][other_before] + distance[node][other_node])
            forest[row][column] = cheapest


def _renaming_cost(one: _Node, other: _Node) -> float:
    if one.label != other.label:
        return 1.0
    if one.content == other.content:
        return 0.0
    return Levenshtein.distance(one.content, other.content) / max(len(one.content), len(other.content))
