"""The index of papers: implementation, tests and reference values of each."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sampler import registry
from scripts.site.docstrings import escaped

ROOT = Path(__file__).resolve().parents[2]
ABOUT = (
    "Every paper that the code cites, the files that say so, and what they are checked by. Golden "
    "data are numbers of other implementations or of the equations in float64; their folders say "
    "which."
)


def cited() -> dict[str, list[str]]:
    """arXiv number -> the files of sampler/ and the worked examples that name it."""
    found: dict[str, list[str]] = {}
    for path, text in _sources():
        for number in sorted(set(re.findall(r"arXiv:(\d+\.\d+)", text))):
            found.setdefault(number, []).append(path)
    return found


def _sources() -> list[tuple[str, str]]:
    files = sorted((ROOT / "sampler").rglob("*.py"))
    files += sorted((ROOT / "docs/examples").glob("*.py"))
    return [(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in files]


def papers_page(notes: dict[str, Any]) -> str:
    """docs/papers.md. Raises ValueError for a paper that the notes do not have."""
    known = cited()
    if missing := sorted(set(known) - set(notes["papers"])):
        raise ValueError(f"docs/reference/notes.yaml has no paper {missing[0]}; add its entry.")
    lines = ["| paper | file | test | golden file |", "|---|---|---|---|"]
    for number, paper in sorted(notes["papers"].items()):
        files = known.get(number) or [
            p for p, text in _sources() if paper.get("find", "\0") in text
        ]
        if not files:
            raise ValueError(f"No code cites {number}; take it out of the notes.")
        checks = {*paper.get("checks", ()), *_checks(notes, files)}
        golden = {check for check in checks if check.startswith("tests/golden/")}
        cells = [_title(number, paper), _listed(files), _listed(checks - golden), _listed(golden)]
        lines.append(f"| {' | '.join(cells)} |")
    left_out = ["| system | why not |", "|---|---|"]
    left_out += [f"| {escaped(name)} | {escaped(why)} |" for name, why in notes["left_out"].items()]
    parts = [f"# Papers\n\n{ABOUT}", "\n".join(lines), "## Left out", "\n".join(left_out)]
    return "\n\n".join(parts) + "\n"


def _title(number: str, paper: dict[str, Any]) -> str:
    link = f", [arXiv:{number}](https://arxiv.org/abs/{number})" if number[0].isdigit() else ""
    return f"{escaped(paper['title'])} ({paper['by']}){link}"


def _checks(notes: dict[str, Any], files: Iterable[str]) -> set[str]:
    """Find the tests of the strategies in these files."""
    found: set[str] = set()
    for kind in registry.KINDS:
        for name in registry.names(kind):
            home = registry.lookup(kind, name).__module__.replace(".", "/") + ".py"
            if home in files and name in notes[kind]:
                found |= set(notes[kind][name]["checks"])
    return found


def _listed(paths: Iterable[str]) -> str:
    """Format links with bare file names: four columns have no room for folders."""
    return "<br>".join(f"[{Path(p).name}](../{p})" for p in sorted(paths)) or "–"


def linked(path: str, up: str) -> str:
    """A link to a file of the repository, from a page from which `up` is docs/."""
    return f"[{path}]({up}/../{path})"
