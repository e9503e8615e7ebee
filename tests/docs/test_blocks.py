"""The documentation is run: Python blocks, command lines and YAML of every page.

In a block marked `sh` or `python` everything runs. What cannot run here (a download, a machine
that is elsewhere) is marked `console`: its `sampler` lines are parsed, so that every option exists.
"""

import argparse
import importlib
import os
import re
import runpy
import shlex
import subprocess
import sys
import traceback
from pathlib import Path

import diffusers  # noqa: F401
import pytest
import typer.core

from sampler import registry
from sampler.cli import main
from sampler.config.layers import read_file, resolve
from sampler.training import recipe
from tests.docs.pages import PAGES, ROOT, blocks, fences, prose, read

LANGUAGES = {"python", "sh", "yaml", "console", "text", "json", "toml", "html"}
LAUNCHERS = ("torchrun", "srun", "accelerate", "timeout")
OTHERS = ("pip", "pre-commit", "mkdir", "cd")  # too little of ours in them to be checked

# What takes hours is run in short, with exactly these changes.
SHORT_PYTHON = {  # in blocks that call sampler.finetune
    r"\bupdates=\d+": "updates=1",
    r'"samples": \d+': '"samples": 8',
    r'"batch": \d+': '"batch": 2',
    r'"steps": \d+': '"steps": 2',
}
SHORT_FINETUNE = ["--updates", "1", "--set", "fit.batch=2", "--set", "fit.steps=2"]
SHORT_DISTIL = ["--set", "trainer.samples=8", "--set", "trainer.warmup=1"]
ELSEWHERE = ("docs/examples/README.md",)  # tests/test_plugins.py installs it and runs it
PARSED = ("calibrate", "bench", "ui")  # minutes, or a server: only their options are looked at


def workplace(folder):
    """A folder in which the documented commands find what a checkout has."""
    for name in ("configs", "docs", "scripts", "constraints.txt"):
        (folder / name).symlink_to(ROOT / name)
    table = "prompt,seed,steps\na fox on a red background,1,2\na dog,2,2\n"
    (folder / "prompts.csv").write_text(table)
    return folder


def short(text):
    if "sampler.finetune(" in text:
        for long, instead in SHORT_PYTHON.items():
            text = re.sub(long, instead, text)
    return text


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_python_blocks_run(page, tmp_path):
    """In order and in one process of their own, so that what they register stays there."""
    workplace(tmp_path)
    child = os.fork()  # torch and diffusers are imported already
    if not child:
        status = 1
        try:
            os.chdir(tmp_path)
            sys.path.insert(0, str(tmp_path))
            for i, text in enumerate(blocks(page, "python")):
                Path(f"block{i}.py").write_text(short(text))
                importlib.import_module(f"block{i}")
            status = 0
        except BaseException:
            Path("error.txt").write_text(traceback.format_exc())
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert status == 0, (tmp_path / "error.txt").read_text()[-3000:]


def lines(text):
    """The commands of a block as words, without prompts, comments and settings before them."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        for part in " ".join(map(shlex.quote, words)).split(" '&&' "):
            found = shlex.split(part)
            while found and re.match(r"\w+=", found[0]):
                found.pop(0)
            if found:
                yield found


# Of every block: a later line may use what an earlier one made.
COMMANDS = [(page, text) for page in PAGES for text in blocks(page, "sh")]


@pytest.mark.parametrize(("page", "text"), COMMANDS, ids=[page for page, _ in COMMANDS])
def test_shell_lines_run(page, text, tmp_path, monkeypatch, capsys):
    # How-to pages are for readers without a checkout: an empty directory.
    monkeypatch.chdir(tmp_path if page.startswith("docs/howto/") else workplace(tmp_path))
    made = False
    for words in lines(text):
        launcher = words[0] if words[0] in LAUNCHERS else ""
        if launcher == "timeout":
            assert "KILL" in words and cut_short(words) in (0, -9, 137), words
        elif words[0] == "sampler" or launcher:
            words = words[words.index("sampler") + 1 :]
            if words[0] in PARSED or page in ELSEWHERE:
                assert parses(lambda words=words: main(words))
                continue
            words = [*words, *shortening(words)]
            with monkeypatch.context() as patch:
                if "torchrun" in words:  # as the launcher sets them
                    patch.setenv("RANK", "0")
                    patch.setenv("WORLD_SIZE", "1")
                code = main(words)
            captured = capsys.readouterr()
            assert code == 0, (words, captured.err)
            assert captured.out or captured.err, words
            made |= "generate" in words and "--dry-run" not in words
        else:
            known(words, monkeypatch)
    files = [name for _, _, found in os.walk(tmp_path) for name in found]
    assert not made or any(name.endswith(".png") for name in files)


def shortening(words):
    # A cluster is not here: what is asked of one is planned only (tests/runs/ has them run).
    if "--executor" in words:
        return ["--dry-run"]
    if words[0] != "finetune":
        return []
    named = [(ROOT / w).read_text() for w in words if w.endswith(".yaml")]
    distils = any("f_distill" in text for text in [*words, *named])
    return SHORT_FINETUNE + (SHORT_DISTIL if distils else [])


def cut_short(words):
    """A command that is meant to be killed, for real."""
    sampler = words.index("sampler")
    call = [*words[:sampler], sys.executable, "-m", "sampler", *words[sampler + 1 :]]
    settings = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(call, capture_output=True, env=settings).returncode


class Parsed(Exception):
    """The arguments were understood, and nothing was done."""


def parses(call):
    """Return whether a program of typer or argparse gets as far as doing something."""

    def stop(*_, **__):
        raise Parsed

    parse = argparse.ArgumentParser.parse_args
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.core.TyperCommand, "invoke", stop)
        patch.setattr(argparse.ArgumentParser, "parse_args", lambda *a, **k: stop(parse(*a, **k)))
        with pytest.raises(Parsed):
            call()
    return True


def known(words, monkeypatch):
    """A script of ours gets its arguments parsed; a target of make exists."""
    if words[0] == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets, words
    elif words[:2] == ["python", "-m"] and words[2].startswith("scripts."):
        monkeypatch.setattr(sys, "argv", words[2:])
        parses(lambda: runpy.run_module(words[2], run_name="__main__", alter_sys=True))
    elif words[0] == "printf":
        line = " ".join(word if word == ">" else shlex.quote(word) for word in words)
        subprocess.run(line, shell=True, check=True)
    elif words[:2] == ["python", "-c"]:
        exec(compile(words[2], "<block>", "exec"), {})
    elif words[:3] == ["python", "-m", "pytest"]:
        assert all((ROOT / w).exists() for w in words[3:] if w.startswith("tests")), words
    else:
        assert words[0] in OTHERS, words


def test_a_script_with_another_option_is_found_out(monkeypatch):
    known(["python", "-m", "scripts.study.fdistill", "document"], monkeypatch)
    known(["python", "-m", "scripts.site.readme_grid", "--out", "a.png"], monkeypatch)
    with pytest.raises(SystemExit):
        known(["python", "-m", "scripts.site.readme_grid", "--none"], monkeypatch)
    with pytest.raises(SystemExit):
        known(["python", "-m", "scripts.study.fdistill", "none"], monkeypatch)


@pytest.mark.parametrize("page", PAGES)
def test_nothing_hides_in_other_blocks(page):
    """A command or a program is in a block that is run, or in one that says that it cannot be."""
    for language, text in fences(page):
        assert language in LANGUAGES, f"{page}: a block is marked {language!r}"
        if language not in ("sh", "python", "console"):
            assert not re.search(r"^(\$ )?(sampler|python|pip|import|from) \w", text, re.M), text
        if language == "console":
            for words in lines(text):
                if words[0] == "sampler":
                    assert parses(lambda words=words: main(words[1:]))
    assert not re.search(r"^ {4,}(sampler|python|pip|make) ", prose(page), re.M)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "yaml")])
def test_yaml_blocks_are_valid(page, tmp_path):
    for text in blocks(page, "yaml"):
        (tmp_path / "c.yaml").write_text(text)
        found = read_file(tmp_path / "c.yaml")
        tunes = re.search("^trainer:", text, re.MULTILINE)
        assert (recipe.resolve_recipe([found]) if tunes else resolve([found], [], [])).version == 1


@pytest.mark.parametrize("kind", ["sampler", "guidance", "trainer"])
def test_the_tables_name_what_exists(kind):
    table = re.search(rf"^\| {kind} \|.*?\n\n", read("README.md"), re.M | re.S)
    assert table is not None
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", table[0], re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted(registry.names(kind))


def test_the_rewards_that_the_readme_names_exist():
    text = re.search(r"^Rewards: (.+?)\n\n", read("README.md"), re.M | re.S)
    assert text is not None
    assert sorted(re.findall(r"`(\w+)`", text[1])) == sorted(registry.names("reward"))
