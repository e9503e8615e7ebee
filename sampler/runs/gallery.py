"""Gallery of a run as one HTML file: thumbnails, CSS-only filters, readable records, no script.

jinja2 escapes every value; the Content-Security-Policy allows images and the style below only.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment

from sampler.runs.folder import RunFolder
from sampler.runs.records import records, shown

MAX_VALUES = 24  # of a filter; an attribute with more values has none
MAX_CARDS = 5000

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

_PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src 'self' file: data:;\
 style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width,initial-scale=1">
<title>{{ title }}</title><style>{{ style }}
{%- for values in filters.values() %}{% set f = loop.index0 %}{% for value in values -%}
body:has(#f{{ f }}-{{ loop.index0 }}:checked) article:not(.f{{ f }}-{{ loop.index0 }}){display:none}
{%- endfor %}{% endfor %}</style></head><body>
<header><h1>{{ title }}</h1><p>{{ count }} of {{ total }} images
{%- if failed %}, {{ failed }} failed{% endif %}
{%- if total > cards|length %}; the first {{ cards|length }} are shown{% endif -%}
; model {{ model }}</p></header>
{% if filters %}<form>{% for name, values in filters.items() %}{% set f = loop.index0 -%}
<fieldset><legend>{{ name[:60] }}</legend>
<input type="radio" name="f{{ f }}" id="f{{ f }}-all" checked><label for="f{{ f }}-all">all</label>
{%- for value in values -%}
<input type="radio" name="f{{ f }}" id="f{{ f }}-{{ loop.index0 }}">
<label for="f{{ f }}-{{ loop.index0 }}">{{ value[:60] }}</label>
{%- endfor %}</fieldset>{% endfor %}</form>{% endif %}
<main>{% for card in cards %}
<article class="{{ card.classes }}">{% if card.file -%}
<a href="{{ card.file|urlencode }}"><img src="{{ card.file|urlencode }}" \
alt="{{ card.prompt[:300] }}" loading="lazy"></a>
{%- else %}<div class="none">{{ card.problem }}</div>{% endif -%}
<p title="{{ card.prompt[:1000] }}">{{ card.prompt[:1000] }}</p><small>{{ card.facts }}</small>
<details><summary>#{{ card.number }} record</summary><pre>{{ card.record }}</pre></details>
</article>
{%- endfor %}</main></body></html>
"""


def page(run: RunFolder) -> str:
    """HTML of a run, of at most MAX_CARDS images."""
    found = list(itertools.islice(records(run), MAX_CARDS))
    filters = _filters(found)
    return (
        Environment(autoescape=True)
        .from_string(_PAGE)
        .render(
            title=run.store.where.rstrip("/").rpartition("/")[2] or "run",
            style=_STYLE,
            count=sum(record["status"] == "ok" for record in found),
            failed=sum(record["status"] == "error" for record in found),
            total=run.total,
            model=run.model.label,
            filters=filters,
            cards=[_card(record, filters) for record in found],
        )
    )


def _filters(found: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Attributes in which the images differ, with their values, if there are few enough."""
    values: dict[str, dict[str, None]] = {}
    for record in found:
        for name, value in _attributes(record).items():
            values.setdefault(name, {})[value] = None
    return {n: sorted(v, key=_rank) for n, v in values.items() if 1 < len(v) <= MAX_VALUES}


def _rank(value: str) -> tuple[float, str]:
    """Sort key: numbers by size, then texts in alphabetical order."""
    try:
        return float(value), value
    except ValueError:
        return float("inf"), value


def _attributes(record: Mapping[str, Any]) -> dict[str, str]:
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


def _card(record: Mapping[str, Any], filters: dict[str, list[str]]) -> dict[str, Any]:
    own = _attributes(record)
    classes = [
        f"f{number}-{values.index(own[name])}"
        for number, (name, values) in enumerate(filters.items())
        if name in own
    ]
    scale = "" if record["scale"] is None else f" {record['scale']:g}"
    facts = [f"{record['guidance']['name']}{scale}", record["sampler"]["name"],
             f"{record['steps']} steps", f"seed {record['seed']}"]  # fmt: skip
    body = {name: value for name, value in record.items() if value not in (None, [], {}, "")}
    return {
        "classes": " ".join(classes),
        "file": record["file"],
        "problem": record["error"] or record["status"],
        "prompt": record["prompt"],
        "facts": " · ".join(fact.replace(" ", "\N{NO-BREAK SPACE}") for fact in facts),
        "number": f"{record['index']:06d}",
        "record": json.dumps(body, ensure_ascii=False, indent=1),
    }
