"""Find commands in a page that this project does not have; the site is not built with one.

Only names are compared: of commands with the source of the command line, of make's targets with the Makefile. The
source is parsed and not imported, because the site is built without the packages of the program. Options are checked by
`tests/docs/test_commands.py`.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
_SHELL = re.compile(r"^ *```(?:sh|bash|console)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
_SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_PROGRAM = re.compile(r"(?:^|[\s$(\"])minicpmv-finetune ([a-z][\w-]*)(?: ([a-z][\w-]*))?")
_MAKE = re.compile(r"^\W*make ([a-z][\w-]*)")


def unknown_commands(markdown: str) -> Iterator[str]:
    """Yield each command in a page's shell blocks and code spans that does not exist."""
    shell = "\n".join(_SHELL.findall(markdown)).replace("\\\n", " ")
    for text in [*shell.splitlines(), *_SPAN.findall(markdown)]:
        for name, second in _PROGRAM.findall(text):
            found = commands().get(name)
            if found is None:
                yield f"minicpmv-finetune {name}"
            elif found and second and second not in found:
                yield f"minicpmv-finetune {name} {second}"
        target = _MAKE.match(text)
        if target and target.group(1) not in _targets():
            yield f"make {target.group(1)}"


@cache
def commands() -> dict[str, frozenset[str]]:
    """Return the names of all commands, each with those of its subcommands."""
    own: dict[str, frozenset[str]] = {}
    for path in (ROOT / "minicpmv_finetune" / "cli").glob("*.py"):
        tree = ast.parse(path.read_text())
        groups = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and _attribute(node) == "add_typer" and node.keywords:
                names = [word.value.value for word in node.keywords if word.arg == "name"]  # type: ignore[attr-defined]
                groups[ast.unparse(node.args[0])] = str(names[0])
        found: dict[str, set[str]] = {}
        for node in ast.walk(tree):
            for call in getattr(node, "decorator_list", []):
                if _attribute(call) == "command":
                    found.setdefault(ast.unparse(call.func.value), set()).add(
                        _name(call) or node.name.replace("_", "-")
                    )
            if isinstance(node, ast.Call) and _attribute(node) == "command" and (name := _name(node)):
                found.setdefault(ast.unparse(node.func.value), set()).add(name)  # type: ignore[attr-defined]
        own |= dict.fromkeys(found.pop("app", set()), frozenset())
        own |= {groups[group]: frozenset(names) for group, names in found.items()}
    return own


def _attribute(node: ast.AST) -> str:
    """Return the name of the method that a call calls; empty for another node."""
    return node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else ""


def _name(call: ast.Call) -> str:
    """Return the name that a command is given; empty if it is that of its function."""
    given = call.args[0] if call.args else None
    return str(given.value) if isinstance(given, ast.Constant) else ""


@cache
def _targets() -> frozenset[str]:
    return frozenset(re.findall(r"^([a-z][\w-]*):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))
