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
        groups: dict[str, str] = {}
        found: dict[str, set[str]] = {}
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                for call in node.decorator_list:
                    if app := _owner(call, "command"):
                        found.setdefault(app, set()).add(_given_name(call) or node.name.replace("_", "-"))
            elif (app := _owner(node, "command")) and (name := _given_name(node)):
                found.setdefault(app, set()).add(name)
            elif isinstance(node, ast.Call) and _owner(node, "add_typer"):
                for word in node.keywords:
                    if word.arg == "name" and isinstance(word.value, ast.Constant):
                        groups[ast.unparse(node.args[0])] = str(word.value.value)
        own |= dict.fromkeys(found.pop("app", set()), frozenset())
        own |= {groups[app]: frozenset(names) for app, names in found.items()}
    return own


def _owner(node: ast.AST, method: str) -> str:
    """Return the object whose method of this name a node calls; empty for another node."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == method:
        return ast.unparse(node.func.value)
    return ""


def _given_name(node: ast.AST) -> str:
    """Return the name that a call gives a command; empty if the command has the name of its function."""
    given = node.args[0] if isinstance(node, ast.Call) and node.args else None
    return str(given.value) if isinstance(given, ast.Constant) else ""


@cache
def _targets() -> frozenset[str]:
    return frozenset(re.findall(r"^([a-z][\w-]*):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))
