"""The command as a process: interrupts at any instant, output streams, version, completion."""

import json
import os
import signal
import subprocess
import sys

import pytest
import typer

from sampler.cli.commands import COMMANDS, parser

# Send SIGINT to this process at the moment when a module is imported for the first time.
AT_IMPORT = """
import os, signal, sys
from importlib.abc import MetaPathFinder

class Interrupt(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)

sys.argv = ["sampler", *{arguments!r}]
from sampler.cli.entry import main
sys.meta_path.insert(0, Interrupt())
code = main()
print("not interrupted", file=sys.stderr)
sys.exit(code)
"""


def python(code, *arguments, **environment):
    return subprocess.run(
        [sys.executable, *(["-c", code] if code else ["-m", "sampler"]), *arguments],
        capture_output=True,
        timeout=300,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("sampler.cli.commands", ["list"]),
        ("typer", ["list", "samplers"]),
        ("pydantic", ["generate", "a fox"]),
        ("sampler.cli.batch", ["generate", "a fox"]),
        ("yaml", ["validate", "x.yaml"]),
        ("torch", ["generate", "a fox", "-o", "out", "--steps", "1"]),
        ("numpy", ["replay", "x.png"]),
    ],
)
def test_an_interrupt_during_an_import_is_one_sentence(tmp_path, monkeypatch, module, arguments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_text("run: {steps: 2}\n")
    (tmp_path / "x.png").write_bytes(b"no image")
    done = python(AT_IMPORT.format(module=module, arguments=arguments))
    text = done.stderr.decode()
    if module == "torch":  # inside a run, where the first signal asks it to stop
        assert text.startswith("Stopping after the current step"), text
        assert "Traceback" not in text and done.returncode == 130
        return
    assert (done.returncode, done.stdout, text) == (130, b"", "sampler: Interrupted.\n")


def test_an_interrupt_is_an_event_too():
    arguments = ["list", "samplers", "--json"]
    done = python(AT_IMPORT.format(module="sampler.samplers", arguments=arguments))
    event = json.loads(done.stdout)
    assert done.returncode == 130
    assert (event["t"], event["code"], event["message"]) == ("error", 130, "Interrupted.")


AT_CALL = """
import os, signal, sys
from sampler.cli.entry import main

class Finalized:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(10):
            pass

from sampler.cli import list
def strategies(kind, report):
    {line}
    return []
list.strategies = strategies
sys.argv = ["sampler", "list", "samplers"]
sys.exit(main())
"""


@pytest.mark.parametrize("line", ["os.kill(os.getpid(), signal.SIGINT)", "Finalized()"])
def test_an_interrupt_inside_a_command_is_one_sentence(line):
    """Also in a finalizer, whose exceptions Python prints and drops."""
    done = python(AT_CALL.format(line=line))
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"sampler: Interrupted.\n")


def test_an_interrupt_while_python_shuts_down_prints_nothing():
    code = (
        "import atexit, os, signal, sys\n"
        "from sampler.cli.entry import main\n"
        "atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))\n"
        "sys.argv = ['sampler', 'list']\n"
        "sys.exit(main())\n"
    )
    done = python(code)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, b"")
    assert done.stdout.split()[0] == b"samplers"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_output_streams_of_any_encoding(tmp_path, monkeypatch, encoding):
    """Characters that a stream lacks are escapes, events stay JSON, and the run goes on."""
    monkeypatch.chdir(tmp_path)
    streams = {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    shown = "日本" if encoding == "utf-8" else "\\u65e5\\u672c"
    (tmp_path / "日本.txt").write_text("a fox\n")
    done = python("", "validate", "日本.txt", **streams)
    assert done.stdout.decode(encoding) == f"{shown}.txt: ok, 1 lines, 1 images\n", done.stderr
    line = ["generate", "a fox ü 日本"]
    done = python("", *line, "--sampler", "日本", "--json", **streams)
    assert done.returncode == 2 and b"Traceback" not in done.stderr
    assert "日本" in json.loads(done.stdout.decode(encoding))["message"]
    assert shown in done.stderr.decode(encoding)


def test_the_version_is_that_of_the_package():
    from importlib.metadata import version

    done = python("", "--version")
    assert done.stdout.decode().split() == ["diffusion-sampler", version("diffusion-sampler")]
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("sampler gener", {"generate"}),
        ("sampler generate --sca", {"--scale"}),
        ("sampler generate --preset d", {"draft"}),
        ("sampler generate --sampler ghv", {"ghvb"}),
        ("sampler generate --guidance cfg_z", {"cfg_zero"}),
        ("sampler finetune --trainer align", {"alignprop"}),
        ("sampler list sche", {"schedulers"}),
    ],
)
def test_completion_of_a_shell(words, expected):
    count = str(len(words.split()) - 1)
    shell = {"_SAMPLER_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": count}
    done = python("", **shell)
    assert (done.returncode, set(done.stdout.decode().split())) == (0, expected), done.stderr


@pytest.mark.parametrize(
    ("words", "imported"),
    [("list samplers", "list"), ("config schema", "validate"), ("--help", ""), ("--version", "")],
)
def test_only_the_named_command_is_imported(words, imported):
    code = (
        "import sys; from sampler.cli import main; main(sys.argv[1:]); "
        "print(*sorted(m for m in sys.modules if m.startswith('sampler.cli.')), file=sys.stderr)"
    )
    done = python(code, *words.split())
    loaded = set(done.stderr.decode().split())
    commands = {place.partition(":")[0] for place, _ in COMMANDS.values()}
    assert {name for name in commands if f"sampler.cli.{name}" in loaded} == set(imported.split())


def test_the_overview_has_the_first_paragraph_of_every_help():
    whole = typer.main.get_command(parser()).commands
    assert set(whole) == set(COMMANDS)
    for name, (_, summary) in COMMANDS.items():
        assert " ".join(whole[name].help.split("\n\n")[0].split()) == summary
