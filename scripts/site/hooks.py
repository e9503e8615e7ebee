"""mkdocs hook: make links to repository files work in the site as they do on a forge.

A link that leaves docs/ is right where the repository is browsed. For the site its target is made
a page below repository/: Markdown as it is, other text as code, a folder as a list, pictures as
files. In the navigation a folder of docs/ stands for all of its pages.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from posixpath import dirname, join, normpath, relpath
from typing import TYPE_CHECKING, Any

from mkdocs.structure.files import File

if TYPE_CHECKING:
    from pathlib import Path

    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(?=[#)])")
FENCE = re.compile(r"^ *(```|~~~).*?^ *\1", re.MULTILINE | re.DOTALL)
IMAGE = re.compile(r'<img [^>]*src="([^"]+)"[^>]*>')
HIDDEN = "---\nsearch:\n  exclude: true\n---\n\n"  # sources would drown the pages in a search
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".json": "json", ".csv": "text"}
BINARY = {".png", ".npz", ".safetensors"}

_origins: dict[str, str] = {}
"""Page in the site -> file of the repository that it shows, for the pages made here."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Expand a folder name in the navigation to its pages."""
    from pathlib import Path

    config.nav = _expanded(config.nav, Path(config.docs_dir))
    return config


def _expanded(item: Any, docs: Path) -> Any:
    if isinstance(item, list):
        return [_expanded(part, docs) for part in item]
    if isinstance(item, dict):
        return {title: _expanded(part, docs) for title, part in item.items()}
    if isinstance(item, str) and item.endswith("/"):
        pages = sorted((docs / item).glob("*.md"), key=lambda p: (p.stem != "index", p.stem))
        return [f"{item}{page.name}" for page in pages]
    return item


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add a page for every file outside docs/ that a page or the navigation links to."""
    from pathlib import Path

    _origins.clear()
    root = Path(config.docs_dir).parent
    wanted = [path for path in _named(config.nav) if path.startswith("repository/")]
    queue = [path.removeprefix("repository/") for path in wanted]
    for file in files.documentation_pages():
        queue += _outside(f"docs/{file.src_uri}", file.content_string)
    done: set[str] = set()
    while queue:
        path = queue.pop()
        if path in done or not (root / path).exists():
            continue
        done.add(path)
        file, text = _shown(config, root, path)
        _origins[file.src_uri] = join(path, "folder") if (root / path).is_dir() else path
        files.append(file)
        queue += _outside(_origins[file.src_uri], text)
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Rewrite repository links to site links."""
    here = page.file.src_uri
    origin = _origins.get(here, f"docs/{here}")
    sites = {path: uri for uri, path in _origins.items()}
    sites |= {dirname(path): uri for path, uri in sites.items() if path.endswith("/folder")}

    def replaced(found: re.Match[str]) -> str:
        path = normpath(join(dirname(origin), found[1]))
        site = path.removeprefix("docs/") if path.startswith("docs/") else sites.get(path)
        return found[1] if site is None else relpath(site, dirname(here) or ".")

    parts, end = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [LINK.sub(replaced, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, LINK.sub(replaced, markdown[end:])])


def on_page_content(html: str, **_: Any) -> str:
    """Link pictures to themselves: charts are wider than a phone."""
    return IMAGE.sub(r'<a href="\1" title="Full size">\g<0></a>', html)


def _outside(origin: str, text: str) -> Iterator[str]:
    """Collect the repository files outside docs/ that a page links to."""
    for found in LINK.finditer(FENCE.sub("", text)):
        path = normpath(join(dirname(origin), found[1]))
        if not path.startswith(("docs/", "../", "/")) and path != "docs":
            yield path


def _shown(config: MkDocsConfig, root: Path, path: str) -> tuple[File, str]:
    """Return the site page of a repository file or folder, and its Markdown."""
    source, uri = root / path, f"repository/{path}"
    if source.is_dir():
        names = sorted(p.name for p in source.iterdir() if p.is_file())
        text = f"{HIDDEN}# {path}\n\n" + "".join(f"- [{name}]({name})\n" for name in names)
        return File.generated(config, f"{uri}/index.md", content=text), text
    if source.suffix in BINARY:
        return File.generated(config, uri, abs_src_path=str(source)), ""
    text = source.read_text(encoding="utf-8")
    if source.suffix == ".md":
        return File.generated(config, uri, content=text), text
    language = LANGUAGES.get(source.suffix, "text")
    text = f"{HIDDEN}# {path}\n\n~~~~~{language}\n{text}\n~~~~~\n"
    return File.generated(config, f"{uri}.md", content=text), ""


def _named(nav: Any) -> Iterable[str]:
    """List all pages in the navigation."""
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav or []
    return [name for part in parts for name in _named(part)]
