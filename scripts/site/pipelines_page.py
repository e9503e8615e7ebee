"""The page docs/pipelines.md from the rows of docs/figures/pipelines.csv; see `pipelines.py`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import diffusers

from tests.classic.table import LEFT_OUT, TINY

Row = Mapping[str, str]
GUIDED = ("cfg", "cfg with match_norm", "none")
DROPPED = ("equal", "finite")
HEAD = """# Pipelines

<!-- written by `python -m scripts.site.pipelines`; tests/guidance/test_classic.py checks rows -->

The classic pipeline classes that diffusers @version@ exports, each tried on a tiny random pipeline
(CPU, float32) whose parts are built in memory by `tests/classic`, with stand-ins for ftfy and for
torchvision's resizing. Only the order of three branches goes by a part of the class name, so that
classes that are not in the table are served by the same code. The suite checks a sample of 40 rows;
`python -m pytest tests/guidance/test_classic.py -m every_class` the others.

- **engine**: *native* (an adapter of its own, [families](families.md)) or *hosted*: `sampler.load`
  calls the pipeline itself; tried with the samplers `ab` and `ghvb`.
- **guide**: the rule inside `sampler.guide` that gives the pipeline's own images within 1e-5: `cfg`
  at the pipeline's scale, or `none` where a call evaluates one branch.
- **drop-in**: `sampler.scheduler("ddim", ...)` gives the pipeline's own images within 1e-5
  (*equal*), or where its own scheduler takes other steps, `ab` makes finite ones (*finite*).
- **image inputs**: for `generate(..., inputs={...})` and `--input NAME=FILE`, of one class or
  another of the row; [pipelines.csv](figures/pipelines.csv) has a row for every class.

@counts@

| folder of diffusers | classes | engine | guide | drop-in | image inputs |
|---|---|---|---|---|---|
"""
REFUSED = """
## Refused in part

| class | what | sentence |
|---|---|---|
"""
UNTRIED = """
## Not tried

| classes | why |
|---|---|
"""
SHORT = 230


def served(row: Row) -> bool:
    """True for a class that works in each of the three ways."""
    fine = row["hosted"] == "yes" and row["guide"] in GUIDED
    return fine and row["scheduler"] in DROPPED


def page(rows: Mapping[str, Row]) -> str:
    """The document."""
    tried = [rows[name] for name in sorted(TINY)]
    head = HEAD.replace("@version@", diffusers.__version__).replace("@counts@", counts(tried))
    return head + _families(tried) + REFUSED + _refused(tried) + UNTRIED + _untried()


def counts(tried: Sequence[Row]) -> str:
    """Number of the classes that work in each way."""
    names = [row["guide"] for row in tried]
    guided = sum(name in GUIDED for name in names)
    share = [
        f"{len(tried)} classes are tried and {len(LEFT_OUT)} are not.",
        f"{sum(row['hosted'] == 'yes' for row in tried)} run hosted,",
        f"{guided} are guided ({names.count('none')} of them have one branch),",
        f"{sum(row['scheduler'] in DROPPED for row in tried)} take a drop-in scheduler",
        f"({sum(row['scheduler'] == 'equal' for row in tried)} equal);",
        "each of the others is refused in the sentence below.",
    ]
    return " ".join(share)


def _families(tried: Sequence[Row]) -> str:
    groups: defaultdict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in tried:
        if served(row):
            key = row["family"], row["native"], row["guide"], row["scheduler"]
            groups[key].append(row)
    lines: list[str] = []
    for (folder, native, guide, scheduler), members in sorted(groups.items()):
        names = ", ".join(f"`{row['class'].removesuffix('Pipeline')}`" for row in members)
        inputs = sorted({name for row in members for name in row["inputs"].split()})
        listed = ", ".join(f"`{name}`" for name in inputs)
        engine = "native, hosted" if native else "hosted"
        lines.append(f"| {folder} | {names} | {engine} | {guide} | {scheduler} | {listed} |\n")
    return "".join(lines)


def _refused(tried: Sequence[Row]) -> str:
    lines: list[str] = []
    for row in tried:
        by_sentence: defaultdict[str, list[str]] = defaultdict(list)
        for column, good in (("hosted", ("yes",)), ("guide", GUIDED), ("scheduler", DROPPED)):
            if row[column] not in good:
                text = row[column].split("cannot be hosted: ")[-1].replace("|", "/")
                by_sentence[text].append("drop-in" if column == "scheduler" else column)
        for text, where in by_sentence.items():
            short = text if len(text) <= SHORT else text[:SHORT].rsplit(" ", 1)[0] + " …"
            lines.append(f"| `{row['class']}` | {', '.join(where)} | {short} |\n")
    return "".join(lines)


def _untried() -> str:
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for name, why in LEFT_OUT.items():
        groups[why].append(f"`{name.removesuffix('Pipeline')}`")
    return "".join(f"| {', '.join(names)} | {why} |\n" for why, names in groups.items())
