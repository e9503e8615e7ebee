"""The site builds without a warning, loads nothing from elsewhere, and finds what it links to."""

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
import yaml

import sampler
from tests.docs.pages import ROOT, read

FETCHED = {  # attributes whose address a browser fetches to show the page
    "script": ("src",), "img": ("src", "srcset"), "iframe": ("src",), "source": ("src", "srcset"),
    "audio": ("src",), "video": ("src", "poster"), "embed": ("src",), "object": ("data",),
}  # fmt: skip
LINKS = {"stylesheet", "preload", "prefetch", "icon", "modulepreload", "preconnect", "dns-prefetch"}
AWAY = re.compile(r"\s*(https?:)?//")
CSS = re.compile(r"""@import\s*["']?\s*([^"';)]+)|url\(\s*["']?([^"')]+)""")


def build(out, folder):
    """mkdocs with the options of `make docs`."""
    options = re.search(r"mkdocs (build .*)", read("Makefile"))[1].split()
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", *options, "--site-dir", out],
        cwd=folder, capture_output=True, text=True, timeout=300,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    done = build(out, ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.mark.parametrize("fault", ["[broken](nowhere.md)", "[anchor](#nowhere)", None])
def test_the_options_make_a_broken_link_an_error(tmp_path, fault):
    """--quiet would silence the warnings that --strict counts."""
    config = yaml.safe_load(read("mkdocs.yml"))
    small = {"site_name": "small", "validation": config["validation"], "nav": [{"A": "index.md"}]}
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(small))
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# A page\n\n{fault or 'text'}\n")
    assert build(tmp_path / "site", tmp_path).returncode == (1 if fault else 0)
    (tmp_path / "docs" / "lost.md").write_text("# Not in the navigation\n")
    assert build(tmp_path / "site", tmp_path).returncode == 1


def test_examples_use_no_deprecated_argument():
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        assert "torch_dtype" not in path.read_text(encoding="utf-8"), path


class Page(HTMLParser):
    """Files that a page fetches, its links, and its anchors."""

    def __init__(self, text):
        super().__init__()
        self.fetched, self.links, self.anchors, self.mermaid = [], [], set(), False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = {key: value or "" for key, value in attrs}
        self.fetched += [given[key] for key in FETCHED.get(tag, ()) if key in given]
        if tag == "link" and LINKS & set(given.get("rel", "").split()):
            self.fetched.append(given.get("href", ""))
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        self.fetched += [a or b for a, b in CSS.findall(given.get("style", ""))]
        self.anchors |= {given[key] for key in ("id", "name") if key in given}
        self.mermaid |= "mermaid" in given.get("class", "").split()


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}


def test_nothing_is_fetched_from_elsewhere(site, pages):
    assert len(pages) > 60
    for path, page in pages.items():
        away = [address for address in page.fetched if AWAY.match(address)]
        assert not away, (path, away)
        assert not page.mermaid, "the theme would fetch mermaid for it"
    for path in site.rglob("*.css"):
        text = path.read_text(encoding="utf-8")
        assert not [a or b for a, b in CSS.findall(text) if AWAY.match(a or b)], path


def test_every_link_inside_the_site_leads_to_a_page_and_its_anchor(pages):
    checked = 0
    for path, page in pages.items():
        if path.name == "404.html":
            continue
        for link in page.links:
            target, anchor = urldefrag(link)
            if re.match(r"\w+:", target):
                continue
            there = (path.parent / unquote(target)).resolve() if target else path
            there = there / "index.html" if there.is_dir() else there
            assert there.exists(), (path, link)
            if anchor and there.suffix == ".html":
                assert unquote(anchor) in pages[there].anchors, (path, link)
            checked += 1
    assert checked > 1000


def test_links_out_of_docs_lead_to_copies(site):
    """The model card, sources and recipes are where pages say, with their own pictures."""
    card = (site / "repository/sampler/bundled/index.html").read_text(encoding="utf-8")
    assert "Model card" in card and (site / "repository/sampler/bundled/contact_sheet.png").exists()
    source = (site / "repository/sampler/samplers/ghvb.py.html").read_text(encoding="utf-8")
    assert "momentum_number" in source


def test_the_python_reference_has_every_public_name(site):
    page = Page((site / "reference/api.html").read_text(encoding="utf-8"))
    named = {anchor.rpartition(".")[2] for anchor in page.anchors}
    assert set(sampler.__all__) <= named, set(sampler.__all__) - named
    assert {"RewardBase", "TrainerBase"} <= named


def test_every_page_is_in_the_navigation(site):
    """mkdocs warns of pages without a place, an error here; a folder stands for its pages."""
    config = yaml.safe_load(read("mkdocs.yml"))
    assert config["theme"]["font"] is False and "repo_url" not in config
    home = (site / "index.html").read_text(encoding="utf-8")
    for name in ("ghvb", "apg", "alignprop", "brightness"):
        assert re.search(rf'href="reference/\w+/{name}\.html"', home), name


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_a_browser_asks_nobody_else(site):
    """Also what scripts load: every request of a few pages is for a file here."""
    from playwright.sync_api import sync_playwright

    asked, errors = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        for name in ("index", "reference/sampler/ghvb", "samplers", "papers"):
            page.goto((Path(site) / f"{name}.html").as_uri())
            page.wait_for_load_state("load")
        browser.close()
    assert len(asked) > 10 and not [url for url in asked if not url.startswith(("file:", "data:"))]
    assert not errors
