"""Hooks of mkdocs: pages that are stored outside docs/, and the API reference from the package's docstrings.

The READMEs, CONTRIBUTING.md, CHANGELOG.md, k8s/README.md and the README of each step stay where readers of the
repository expect them, and are pages of the site too. Links are written for the repository; here each link is turned
into one that works on the site: to a page, to a module's reference, or, for a file that is no page, into plain text.
A page with a command that does not exist ends the build.
The reference is generated from the source by griffe, which imports nothing, so that the site builds without torch.
"""

import ast
import posixpath
import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from docs.site_commands import unknown_commands  # noqa: E402

PACKAGE = "minicpmv_finetune"

_OUTSIDE = {
    "README.md": "index.md",
    "README.zh-CN.md": "index.zh-CN.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "k8s/README.md": "kubernetes.md",
    "examples/README.md": "examples.md",
    **{
        path.relative_to(ROOT).as_posix(): f"steps/{path.parent.name}.md"
        for path in sorted((ROOT / PACKAGE / "components").glob("*/README.md"))
    },
}
"""Pages stored outside docs/: path in the repository to path in the site."""
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
_NAME = re.compile(r"`([A-Za-z]\w*)`")
_FENCE = re.compile(r"^(```.*?^```)", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that have no file in docs/."""
    for source, page in _OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    modules = _modules()
    for module, path in modules.items():
        files.append(File.generated(config, _reference(path), content=f"# {module}\n\n::: {module}\n"))
    rows = [
        f"| [`{module}`]({_reference(path).removeprefix('reference/')}) | {_summary(path)} |"
        for module, path in modules.items()
    ]
    head = (
        "# All modules\n\nOne page for each module, from its docstrings. What programs use is in the "
        "[Python API](../api.md).\n\n| Module | Content |\n|---|---|\n"
    )
    index = head + "\n".join(rows) + "\n"
    files.append(File.generated(config, "reference/index.md", content=index))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links of the repository into links of the site."""
    sources = {site: source for source, site in _OUTSIDE.items()}
    here = page.file.src_uri
    source = sources.get(here, f"docs/{here}")
    if here.startswith("reference/"):
        return markdown
    if unknown := list(unknown_commands(markdown)) if here != "changelog.md" else []:
        raise PluginError(f"{source}: there is no command `{'`, `'.join(unknown)}`; correct the page.")
    # Fenced code, at odd places, is left as it is.
    pieces = _FENCE.split(markdown)
    return "".join(piece if at % 2 else _with_site_links(piece, source, here) for at, piece in enumerate(pieces))


def _with_site_links(text: str, source: str, here: str) -> str:
    def replaced(link: re.Match[str]) -> str:
        image, label, target = link.groups()
        if re.match(r"[a-z]+:|#", target):
            return link.group()
        path, mark, anchor = target.partition("#")
        in_repository = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        site = _site_path(in_repository)
        if site is None:
            return label
        if site.startswith("reference/") and (name := _NAME.fullmatch(label)):
            # A name in a link to a module leads to the name's description; an unknown one ends the build.
            mark, anchor = "#", f"{site.removeprefix('reference/').removesuffix('.md').replace('/', '.')}.{name[1]}"
        return f"{image}[{label}]({posixpath.relpath(site, posixpath.dirname(here) or '.')}{mark}{anchor})"

    return _LINK.sub(replaced, text)


def _site_path(path: str) -> str | None:
    """Return the page of the site for a path of the repository, or None if it has none.

    Raises:
        PluginError: The repository has no such file.
    """
    if not (ROOT / path).exists():
        raise PluginError(f"{path}: a page links to it, and it does not exist; correct the link.")
    if path in _OUTSIDE:
        return _OUTSIDE[path]
    if path.startswith("docs/") and not path.endswith(".py"):
        return path.removeprefix("docs/")
    if path.startswith(f"{PACKAGE}/") and path.endswith(".py"):
        return _reference(path)
    return None


def _modules() -> dict[str, str]:
    """Return every module of the package with its path in the repository."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        relative = path.relative_to(ROOT)
        parts = relative.parts[:-1] if relative.name == "__init__.py" else relative.with_suffix("").parts
        found[".".join(parts)] = relative.as_posix()
    return found


def _summary(path: str) -> str:
    """Return the first sentence of a module's docstring, as far as it is on the first line."""
    docstring = ast.get_docstring(ast.parse((ROOT / path).read_text())) or ""
    return docstring.partition("\n")[0].replace("|", "\\|")


def _reference(path: str) -> str:
    """Return the reference page of a module's file."""
    return f"reference/{path.removesuffix('/__init__.py').removesuffix('.py')}.md"
