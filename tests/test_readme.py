"""The documentation is run: its Python blocks, its `sampler` lines, its YAML, links and tables."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from sampler import registry
from sampler.cli import main
from sampler.layers import read_file, resolve

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", "docs/how_it_works.md", "docs/command_line.md",
         "docs/scale.md", "docs/reliability.md"]  # fmt: skip
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page, language):
    return [text for name, text in BLOCK.findall((ROOT / page).read_text()) if name == language]


def workplace(folder):
    """A folder in which the documented commands find what a checkout has."""
    (folder / "configs").symlink_to(ROOT / "configs")
    table = "prompt,seed,steps\na fox on a red background,1,2\na dog,2,2\n"
    (folder / "prompts.csv").write_text(table)
    return folder


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_python_blocks_run(page, tmp_path):
    """In order and in one process of their own, so that what they register stays there."""
    names = [f"block{i}.py" for i, _ in enumerate(blocks(page, "python"))]
    for name, text in zip(names, blocks(page, "python"), strict=True):
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        [sys.executable, "-c", "; ".join(f"import {name.removesuffix('.py')}" for name in names)],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def commands(text):
    """The `sampler` command lines of a block as words, also of those that a launcher starts."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["sampler"] or words[:1] in (["torchrun"], ["srun"]):
            yield words[words.index("sampler") + 1 :]


# Of every block: a later line may use what an earlier one made.
COMMANDS = [
    (page, lines)
    for page in PAGES
    for text in blocks(page, "sh")
    if (lines := list(commands(text)))
]


@pytest.mark.parametrize(("page", "lines"), COMMANDS, ids=[page for page, _ in COMMANDS])
def test_shell_lines_run(page, lines, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(workplace(tmp_path))
    for words in lines:
        # A cluster is not here: what is asked of one is planned only (tests/runs/ has them run).
        far = "--executor" in words
        code = main([*words, "--dry-run"] if far else words)
        captured = capsys.readouterr()
        assert code == 0, (words, captured.err)
        assert captured.out or "already" in captured.err, words
    if any("generate" in words and "--executor" not in words for words in lines):
        made = [name for _, _, files in os.walk(tmp_path) for name in files if name[-4:] == ".png"]
        assert made


def test_there_is_something_to_run():
    assert sum(len(lines) for _, lines in COMMANDS) >= 5 and len(blocks("README.md", "python")) >= 2


def test_other_shell_lines_are_known_commands():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        for line in "".join(blocks(page, "sh")).replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0] == "make":
                assert words[1] in targets, line
            elif words:
                assert words[0] in ("sampler", "pip", "torchrun", "srun"), line


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "yaml")])
def test_yaml_blocks_are_valid(page, tmp_path):
    for text in blocks(page, "yaml"):
        (tmp_path / "c.yaml").write_text(text)
        assert resolve([read_file(tmp_path / "c.yaml")], [], []).version == 1


@pytest.mark.parametrize("kind", ["sampler", "guidance"])
def test_the_tables_name_what_exists(kind):
    table = re.search(rf"^\| {kind} \|.*?\n\n", (ROOT / "README.md").read_text(), re.M | re.S)
    assert table is not None
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", table[0], re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted(registry.names(kind))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert "://" in target or ((ROOT / page).parent / target).exists(), target
