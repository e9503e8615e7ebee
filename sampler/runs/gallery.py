"""A run as one HTML file: thumbnails, filters by CSS alone, every record readable. No script.

Everything that comes from a user is escaped; the Content-Security-Policy allows images and the
style below, and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any
from urllib.parse import quote

from sampler.runs.folder import RunFolder
from sampler.runs.records import records, shown

MOST_VALUES = 24  # of a facet; with more it is no filter
MOST_CARDS = 5000
_CSP = "default-src 'none'; img-src 'self' file: data:; style-src 'unsafe-inline'"

_STYLE = """
:root{color-scheme:light dark;--paper:#fafaf8;--ink:#1e1e22;--soft:#6b6b73;--line:#dddcd6;
--card:#fff;--accent:#2f5d8a}
@media (prefers-color-scheme:dark){:root{--paper:#17171a;--ink:#ececf0;--soft:#9a9aa4;
--line:#303038;--card:#202025;--accent:#8ab4dc}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.45 system-ui,sans-serif}
header{padding:1.5rem 2rem .5rem}
h1{font-size:1.25rem;margin:0 0 .25rem;font-weight:600}
header p{margin:0;color:var(--soft)}
form{display:flex;flex-wrap:wrap;gap:.5rem 2rem;padding:.75rem 2rem 1rem;
border-bottom:1px solid var(--line)}
fieldset{border:0;margin:0;padding:0;display:flex;flex-wrap:wrap;gap:.3rem;align-items:center;
min-width:0}
legend{float:left;color:var(--soft);font-size:.8rem;margin-right:.5rem;padding:0}
input{position:absolute;opacity:0}
label{font-size:.8rem;padding:.1rem .6rem;border:1px solid var(--line);border-radius:1rem;
cursor:pointer}
input:checked+label{background:var(--accent);border-color:var(--accent);color:var(--paper)}
input:focus-visible+label{outline:2px solid var(--accent);outline-offset:2px}
main{display:grid;grid-template-columns:repeat(auto-fill,minmax(170px,1fr));gap:1rem;
padding:1.25rem 2rem}
article{background:var(--card);border:1px solid var(--line);border-radius:.5rem;overflow:hidden;
display:flex;flex-direction:column}
article img{display:block;width:100%;aspect-ratio:1;object-fit:contain;background:var(--line)}
article p{margin:.5rem .75rem 0;overflow-wrap:anywhere;display:-webkit-box;
-webkit-line-clamp:3;-webkit-box-orient:vertical;overflow:hidden}
article small{display:block;color:var(--soft);margin:.25rem .75rem .5rem;overflow-wrap:anywhere}
details{margin-top:auto;border-top:1px solid var(--line);padding:.35rem .75rem;font-size:.8rem}
summary{cursor:pointer;color:var(--soft)}
pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:.5rem 0}
.none{aspect-ratio:1;display:grid;place-items:center;text-align:center;color:var(--soft);
padding:1rem;background:var(--line)}
"""


def page(run: RunFolder) -> str:
    """The HTML of a run, of at most MOST_CARDS images."""
    found = []
    for record in records(run):
        found.append(record)
        if len(found) >= MOST_CARDS:
            break
    facets = _facets(found)
    return "".join(_parts(run, found, facets))


def _parts(
    run: RunFolder, found: Sequence[Mapping[str, Any]], facets: dict[str, list[str]]
) -> Iterator[str]:
    made = sum(record["status"] == "ok" for record in found)
    title = escape(run.store.where.rstrip("/").rpartition("/")[2] or "run")
    yield (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_CSP}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}{_rules(facets)}</style></head><body>"
        f"<header><h1>{title}</h1><p>{made} of {run.total} images"
    )
    if failed := sum(record["status"] == "error" for record in found):
        yield f", {failed} failed"
    if run.total > len(found):
        yield f"; the first {len(found)} are shown"
    yield f"; model {escape(run.model.label)}</p></header>"
    if facets:
        choices = (_facet(k, name, values) for k, (name, values) in enumerate(facets.items()))
        yield f"<form>{''.join(choices)}</form>"
    yield "<main>"
    for record in found:
        yield _card(record, facets)
    yield "</main></body></html>\n"


def _facets(found: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """What the images differ in, with few enough values to choose from."""
    values: dict[str, dict[str, None]] = {}
    for record in found:
        for name, value in _properties(record).items():
            values.setdefault(name, {})[value] = None
    return {n: sorted(v, key=_rank) for n, v in values.items() if 1 < len(v) <= MOST_VALUES}


def _rank(value: str) -> tuple[float, str]:
    """Numbers by size, texts after them by the alphabet."""
    try:
        return float(value), value
    except ValueError:
        return float("inf"), value


def _properties(record: Mapping[str, Any]) -> dict[str, str]:
    size = f"{record['width']} × {record['height']}"
    plain = {
        "status": record["status"],
        "sampler": record["sampler"]["name"],
        "guidance": record["guidance"]["name"],
        "scale": record["scale"],
        "steps": record["steps"],
        "size": size if record["width"] else None,
        "tag": record["tag"],
        "prompt": record["prompt"],
    }
    covered = {"guidance.scale": "scale"}
    plain |= {n: v for n, v in record["axes"].items() if covered.get(n, n) not in plain}
    return {name: shown(value) for name, value in plain.items() if value is not None}


def _facet(number: int, name: str, values: Sequence[str]) -> str:
    options = [("all", f"f{number}-all", " checked")]
    options += [(value, f"f{number}-{k}", "") for k, value in enumerate(values)]
    inputs = "".join(
        f'<input type="radio" name="f{number}" id="{ident}"{checked}>'
        f'<label for="{ident}">{escape(value[:60])}</label>'
        for value, ident, checked in options
    )
    return f"<fieldset><legend>{escape(name[:60])}</legend>{inputs}</fieldset>"


def _rules(facets: dict[str, list[str]]) -> str:
    """A checked value hides the cards that do not have it."""
    return "".join(
        f"body:has(#f{number}-{k}:checked) article:not(.f{number}-{k}){{display:none}}"
        for number, values in enumerate(facets.values())
        for k in range(len(values))
    )


def _card(record: Mapping[str, Any], facets: dict[str, list[str]]) -> str:
    own = _properties(record)
    classes = " ".join(
        f"f{number}-{values.index(own[name])}"
        for number, (name, values) in enumerate(facets.items())
        if name in own
    )
    prompt = escape(record["prompt"])
    if record["file"]:
        link = quote(record["file"])
        picture = f'<a href="{link}"><img src="{link}" alt="{prompt[:300]}" loading="lazy"></a>'
    else:
        picture = f'<div class="none">{escape(record["error"] or record["status"])}</div>'
    scale = "" if record["scale"] is None else f" {record['scale']:g}"
    parts = [f"{record['guidance']['name']}{scale}", record["sampler"]["name"],
             f"{record['steps']} steps", f"seed {record['seed']}"]  # fmt: skip
    facts = " · ".join(part.replace(" ", "\N{NO-BREAK SPACE}") for part in parts)
    body = {name: value for name, value in record.items() if value not in (None, [], {}, "")}
    text = escape(json.dumps(body, ensure_ascii=False, indent=1))
    return (
        f'<article class="{classes}">{picture}<p title="{prompt[:1000]}">{prompt[:1000]}</p>'
        f"<small>{escape(facts)}</small><details><summary>#{record['index']:06d} record</summary>"
        f"<pre>{text}</pre></details></article>"
    )
