"""Targets of links exist: files, headings, pictures, tests, and options of ours."""

import re
from dataclasses import fields
from posixpath import dirname, join, normpath

import pytest
from markdown.extensions.toc import slugify

from sampler import registry
from sampler.training.policy.window import NoiseWindow
from sampler.training.settings import Settings
from tests.docs.pages import PAGES, ROOT, prose, read
from tests.runs.test_promises import functions_of

ALL = [*PAGES, "CHANGELOG.md", "sampler/bundled/README.md", "tests/runs/README.md"]
WORDS = {"reward", "prompts", "trainer"}  # arguments of sampler.finetune


def links(page):
    """(target, anchor) of every link and picture that stays in the repository."""
    text = re.sub(r"`[^`\n]*`", "", prose(page))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target and not target.startswith("mailto:"):
            path, _, anchor = target.partition("#")
            yield normpath(join(dirname(page), path)) if path else page, anchor


def anchors(page):
    """The anchors of a page's headings, as the site and GitHub make them."""
    found, titles = set(), re.findall(r"^#+ (.+?)(?: \{#([\w-]+)\})?$", prose(page), re.MULTILINE)
    for title, given in titles:
        found.add(given or slugify(re.sub(r"[`*]|\]\(.*?\)", "", title), "-"))
    return found


@pytest.mark.parametrize("page", ALL)
def test_links_lead_somewhere(page):
    for target, anchor in links(page):
        assert not target.startswith("..") and (ROOT / target).exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(target), f"{page}: {target} has no #{anchor}"


@pytest.mark.parametrize("page", PAGES)
def test_tests_that_are_named_exist(page):
    for file, test in re.findall(r"`([\w/]+\.py)::(\w+)`", read(page)):
        assert test in functions_of(file), f"{page}: {file}::{test}"


@pytest.mark.parametrize("page", ["docs/reproducibility.md", "docs/security.md"])
def test_every_rule_names_its_test(page):
    rows = [line for line in prose(page).splitlines() if line.startswith("| ")]
    rules = [line for line in rows if not re.match(r"\| (statement|rule|\*\*)", line)]
    assert len(rules) > 15
    for line in rules:
        assert re.search(r"`[\w/]+\.py::\w+`", line), line


def test_the_options_of_the_porting_page_are_ours():
    """The last column of its tables: `field`, or `field: value`, with a value of the right name."""
    known = {f.name: set() for cls in (Settings, NoiseWindow) for f in fields(cls)}
    for kind in registry.KINDS:
        for name in registry.names(kind):
            for field in registry.describe(kind, name)["fields"]:
                known.setdefault(field["name"], set()).add(str(field["type"]))
    names = {name for kind in registry.KINDS for name in registry.names(kind)}
    seen = 0
    for line in prose("docs/howto/port.md").splitlines():
        if not line.startswith("| ") or line.endswith("| here |"):
            continue
        for text in re.findall(r"`([^`]+)`", line.rpartition("|")[0].rpartition("|")[2]):
            if " " in text and ":" not in text:
                continue  # a command, which test_blocks.py runs elsewhere
            field, _, value = text.partition(": ")
            assert field in known or field in WORDS, line
            called = re.findall(r"name: (\w+)", value)
            assert set(called) <= names, line
            for inner in re.findall(r"(\w+): ", value):
                assert inner in known or inner == "name", line
            if re.fullmatch(r"[a-z_]+\d?", value) and field not in WORDS:
                choices = " ".join(known[field])
                assert not choices or "Literal" not in choices or value in choices, line
            seen += 1
    assert seen > 60
