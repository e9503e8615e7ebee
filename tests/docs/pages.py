"""The pages of the documentation, and the fenced blocks in them."""

import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "CONTRIBUTING.md"] + sorted(
    path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")
)
_BLOCK = re.compile(r"^( *)```([^\n`]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


def fences(page):
    """(language, text) of every fenced block, also of one inside a list."""
    return [(name.strip(), textwrap.dedent(text)) for _, name, text in _BLOCK.findall(read(page))]


def blocks(page, language):
    return [text for name, text in fences(page) if name == language]


def prose(page):
    """A page without its fenced blocks."""
    return _BLOCK.sub("", read(page))
