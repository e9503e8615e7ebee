"""`sampler ui` on the command line: what it refuses, and that its help is light."""

import importlib.util
import subprocess
import sys
import urllib.request

import pytest

import sampler
from sampler.cli import main, models, ui


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom sampler.cli import main\ncode = main(['ui', '--help'])\n"
        "print([n for n in ('torch', 'gradio', 'PIL') if n in sys.modules], file=sys.stderr)\n"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.strip()) == (0, "[]")
    assert "--port" in done.stdout and "--host" not in done.stdout


def test_without_gradio_the_extra_is_named(monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "gradio" else found(name, *a)
    )
    assert main(["ui"]) == 2
    told = capsys.readouterr().err
    assert "pip install 'diffusion-sampler[ui]'" in told and told.count("\n") == 1


def test_wrong_options_are_a_sentence(capsys):
    assert main(["ui", "--dtype", "float8"]) == 2
    assert "'float8' is not one of" in capsys.readouterr().err
    assert main(["ui", "--model", "no/such/model"]) == 6
    assert main(["ui", "--port", "70000"]) == 2


def test_it_serves_until_it_is_interrupted(monkeypatch, capsys, tmp_path):
    pytest.importorskip("gradio")

    told = []
    monkeypatch.setattr(models, "load_engine", lambda model: told.append(capsys.readouterr().err)
                        or sampler.load())  # fmt: skip

    def interrupted():
        assert told == ["Loading the model ...\n"]
        address = capsys.readouterr().out.strip()
        assert address.startswith("http://127.0.0.1:")
        assert urllib.request.urlopen(address, timeout=60).status == 200
        raise KeyboardInterrupt

    monkeypatch.setattr(ui, "_wait", interrupted)
    assert main(["ui", "--port", "0", "-o", str(tmp_path / "runs")]) == 0
    assert "closed" in capsys.readouterr().err and not (tmp_path / "runs").exists()
