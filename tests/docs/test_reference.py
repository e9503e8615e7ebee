"""The reference pages are what their script writes, complete, and right about rows and files."""

import csv
import re

import pytest
from PIL import Image

import sampler
from sampler import registry
from scripts.site import docstrings as docs_docstrings
from scripts.site import figures as docs_figures
from scripts.site import papers as docs_papers
from scripts.site import reference as docs_reference
from tests.docs.pages import ROOT, read

STRATEGIES = [(kind, name) for kind in docs_reference.KINDS for name in registry.names(kind)]
LARGEST = 60_000  # bytes of a picture


def test_committed_pages_are_what_the_script_writes():
    written = docs_reference.pages()
    committed = {
        path.relative_to(ROOT).as_posix()
        for kind in docs_reference.KINDS
        for path in (ROOT / "docs/reference" / kind).glob("*")
    }
    assert committed == set(written) - {"docs/papers.md"}
    changed = [path for path, text in written.items() if read(path) != text]
    assert not changed, f"run scripts/site/reference.py: {changed}"


def test_every_strategy_has_notes_and_none_is_left_over():
    noted = {(kind, name) for kind in docs_reference.KINDS for name in docs_reference.notes()[kind]}
    assert noted == set(STRATEGIES)


@pytest.mark.parametrize(("kind", "name"), STRATEGIES)
def test_what_verifies_a_strategy_exists_and_names_it(kind, name):
    entry = docs_reference.note(kind, name)
    assert entry["checks"] and {*entry} >= {"use", "avoid", "verified"}
    for path in entry["checks"]:
        assert (ROOT / path).is_file(), path
    golden = [path for path in entry["checks"] if "/golden/" in path]
    tests = "".join(read(path) for path in entry["checks"] if path.endswith(".py"))
    known = "".join(p.read_text() for p in (ROOT / "tests").rglob("*.py"))
    for path in golden:  # read by some test, by its name
        assert path.rpartition("/")[2].removesuffix(".npz") in known, path
    cls = registry.lookup(kind, name).__name__
    everywhere = "registry.names" in tests or "SPECS" in tests or "specs" in tests
    assert everywhere or re.search(rf"\b({name}|{cls})\b", tests), "no test names it"


@pytest.mark.parametrize(("kind", "name"), STRATEGIES)
def test_every_field_is_explained_and_every_link_leads_somewhere(kind, name):
    page = f"docs/reference/{kind}/{name}.md"
    for field in sampler.describe(kind, name)["fields"]:
        row = re.search(rf"^\| `{field['name']}` \|.*\| (.+) \|$", read(page), re.MULTILINE)
        assert row is not None and len(row[1]) > 5, field["name"]
    for target in re.findall(r"\]\(([^)#:]+)\)", read(page)):
        assert ((ROOT / page).parent / target).exists(), target


def test_strategies_without_figures_say_why():
    for kind, name in STRATEGIES:
        text = read(f"docs/reference/{kind}/{name}.md")
        note = docs_reference.note(kind, name)
        reason = note.get("no_figure", docs_reference.NO_FIGURE)
        assert ("![" in text) != (reason in text), name
        if docs_reference.NO_FIGURE in text:
            assert kind == "reward" and "run" not in note


def test_pictures_are_small():
    found = sorted((ROOT / docs_reference.FIGURES).glob("*.png"))
    made = {f"{kind}_{name}" for kind, name in docs_figures.names()}
    assert {path.stem for path in found} == made
    for path in found:
        assert path.stat().st_size < LARGEST, path.name
        assert Image.open(path).size[1] == 64 * docs_figures.ENLARGED


def test_counted_rows_are_those_of_the_file():
    """Every sampler and rule is run, as the pages say."""
    with (ROOT / docs_reference.FIGURES / "rows.csv").open() as file:
        stored = list(csv.DictReader(file))
    found = [{key: str(v) for key, v in row.items()} for row in docs_figures.counts()]
    assert found == stored
    assert {row["name"] for row in found} >= {"ddim", "heun", "cfg", "linear_ag", "adaptive"}


def test_pictures_come_from_the_settings_that_the_page_tells():
    model, run = docs_figures.settings("sampler", "ghvb")
    assert model == "bundled" and run["sampler"]["name"] == "ghvb"
    made = docs_figures.engine(model).generate(
        docs_figures.PROMPTS[0], seeds=docs_figures.SEED, **run
    )
    sheet = docs_figures.joined(made.images)
    with Image.open(ROOT / docs_reference.FIGURES / "sampler_ghvb.png") as stored:
        first = stored.convert("RGB").crop((0, 0, *sheet.size))
    pairs = zip(first.resize((16, 16)).tobytes(), sheet.resize((16, 16)).tobytes(), strict=True)
    assert max(abs(a - b) for a, b in pairs) < 40  # another batch size rounds differently


def test_papers_are_all_in_the_index():
    text = read("docs/papers.md")
    known = docs_papers.cited()
    assert len(known) > 25
    for number, files in known.items():
        row = next(line for line in text.splitlines() if f"abs/{number})" in line)
        assert all(f"](../{path})" in row for path in files)
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / "docs" / target).exists(), target


def test_docstrings_are_split():
    found = docs_docstrings.parsed(
        """A thing: first line.

            y = a*x_b

        in prose, w_c <= 1. deviations: none.

        one: first. two, three: shared,
            and more; four: last.
        """,
        ["one", "two", "three", "four"],
    )
    assert found.summary == "A thing: first line."
    assert found.body == ["```text\ny = a*x_b\n```", "in prose, w_c &lt;= 1. deviations: none."]
    assert found.fields == {
        "one": "first", "two": "shared, and more", "three": "shared, and more", "four": "last",
    }  # fmt: skip
