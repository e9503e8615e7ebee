"""Settings of a run besides its prompts: presets, TOML, JSON, offline, secrets, encoders."""

import json
import os
import subprocess
import sys
from typing import get_args

import pytest
import torch
from sampler_kernels import leaves

import sampler
from sampler.cli import main
from sampler.cli.report import redacted
from sampler.config.layers import PRESETS, preset_files, read_file, resolve
from sampler.config.options import Preset
from sampler.core.errors import SamplerError
from sampler.runs.location import RunLocation
from sampler.workers.prompt_cache import PromptCache
from sampler.workers.work import WorkOptions
from tests import tiny
from tests.runs.stub import engine, make, pictures, prompts

YAML = """
version: 1
model: {path: ./models/sd, revision: null, dtype: auto, variant: null, lora: []}
sampler: {name: ghvb, momentum_number: 1.8}
guidance: {name: adaptive, threshold: 0.991, rule: {name: apg, scale: 7.5}}
run: {steps: 25, width: 512, height: 512, n: 4, seed: 1234, batch_size: auto}
errors: {on_nonfinite: retry, on_oom: shrink, max_errors: null}
"""
REST = """
prompts: {file: prompts.jsonl, wildcards: null, expand: none}   # none | random | all
output: {dir: runs, format: png, metadata: full, fsync: true, writer_threads: 2}
limits: {max_jobs: 1000000, max_pixels: 16777216, max_steps: 1000, max_prompt_chars: 20000}
"""
TOML = """
version = 1
sampler = {name = "ghvb", momentum_number = 1.8}
[model]
path = "./models/sd"
[guidance]
name = "adaptive"
threshold = 0.991
rule = {name = "apg", scale = 7.5}
[run]
steps = 25
width = 512
height = 512
n = 4
seed = 1234
"""


def told(capsys, *line):
    capsys.readouterr()
    code = main([str(word) for word in line])
    return code, *capsys.readouterr()


def unset(monkeypatch, name):
    """Unset now, and as it was before when the test has ended, whatever it sets."""
    monkeypatch.setenv(name, "")
    monkeypatch.delenv(name)


def settings(path, text):
    path.write_text(text)
    return resolve([read_file(path)], [], [])


def test_yaml_toml_and_json_say_the_same(tmp_path):
    if sys.version_info < (3, 11):
        pytest.skip("the standard library reads TOML from Python 3.11 on")
    import yaml

    wanted = settings(tmp_path / "c.yaml", YAML)
    assert settings(tmp_path / "c.toml", TOML) == wanted
    body = json.dumps(yaml.safe_load(YAML), indent="\t")
    assert settings(tmp_path / "c.json", body) == wanted


def test_every_section_with_every_key(tmp_path):
    whole = settings(tmp_path / "c.yaml", YAML + REST)
    assert whole.guidance == settings(tmp_path / "d.yaml", YAML).guidance
    assert whole.prompts.file == str(tmp_path / "prompts.jsonl")
    with pytest.raises(SamplerError, match="output.format"):
        settings(tmp_path / "c.yaml", YAML + REST.replace("format: png", "format: gif"))


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("c.toml", "[run]\nsteps = 3\nstps = 4\n", ["c.toml:3", "did you mean 'steps'"]),
        ("c.toml", "[run]\nsteps = 3\nsteps = 4\n", ["c.toml:", "overwrite"]),
        ("c.toml", "[run]\nsteps = nan\n", ["c.toml", "not a finite number"]),
        ("c.toml", "[run]\nsteps = 1979-05-27\n", ["c.toml", "a date"]),
        ("c.toml", "a = " + "[" * 40 + "]" * 40, ["c.toml", "too deep"]),
        ("c.json", '{"run": {\n"stps": 4}}', ["c.json:2", "did you mean 'steps'"]),
        ("c.json", '{"run": {"steps": 3, "steps": 4}}', ["given twice"]),
        ("c.json", '{"run": {"steps": Infinity}}', ["not a finite number"]),
        ("c.json", '{"run": {"steps": 1e999}}', ["not a finite number"]),
        ("c.json", '{"run": \n{"steps": 3,}}', ["c.json:2"]),
        ("c.json", "[" * 100_000, ["deep"]),
        ("c.json", "[" + "0," * 20_000 + "0]", ["too many values"]),
    ],
)
def test_bad_files_are_one_sentence_with_its_place(tmp_path, name, text, words):
    if name.endswith("toml") and sys.version_info < (3, 11):
        pytest.skip("the standard library reads TOML from Python 3.11 on")
    with pytest.raises(SamplerError) as caught:
        settings(tmp_path / name, text)
    assert caught.value.code == 2 and "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_presets_are_below_files_and_known(capsys, tmp_path):
    names = sorted(path.stem for path in PRESETS.glob("*.yaml"))
    assert names == sorted(get_args(Preset))
    for name in names:
        resolve([read_file(path) for path in preset_files(name)], [], [])
    (tmp_path / "c.yaml").write_text("run: {steps: 3}\n")
    line = ("generate", "a", "--dry-run", "--json", "--preset", "draft")
    assert json.loads(told(capsys, *line)[1])["nfe"] == 20
    assert json.loads(told(capsys, *line, "-c", tmp_path / "c.yaml")[1])["nfe"] == 6
    code, _, err = told(capsys, *line[:-1], "drft")
    assert code == 2 and "did you mean 'draft'" in err


def test_a_sweep_needs_an_axis_and_has_a_help_of_its_own(capsys):
    code, _, err = told(capsys, "sweep", "a fox")
    assert code == 2 and "--axis" in err
    sweep, generate = (told(capsys, name, "--help")[1] for name in ("sweep", "generate"))
    assert "evenly spaced" in sweep and "evenly spaced" not in generate


NO_NETWORK = """
import socket, sys
def refuse(*arguments):
    print("NETWORK", arguments[1:], file=sys.stderr)
    raise OSError("no network in this test")
socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = refuse
socket.socket.listen = refuse
from sampler.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_no_network_is_used_and_no_server_started(tmp_path):
    """Also without HF_HUB_OFFLINE: nothing is asked of anyone."""
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    line = ["generate", "a fox", "--steps", "1", "-o", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, "-c", NO_NETWORK, *line], capture_output=True,
                          text=True, timeout=600, env=environment)  # fmt: skip
    assert done.returncode == 0 and "NETWORK" not in done.stderr, done.stderr


@pytest.mark.parametrize("given", ["--offline", "SAMPLER_OFFLINE"])
def test_offline_and_download_exclude_each_other(capsys, monkeypatch, given):
    unset(monkeypatch, "HF_HUB_OFFLINE")
    if given.startswith("SAMPLER"):
        monkeypatch.setenv(given, "1")
    options = [given] if given.startswith("--") else []
    code, _, err = told(capsys, "generate", "a", "--download", *options)
    assert code == 2 and "offline" in err
    assert told(capsys, "generate", "a", "--dry-run", *options)[0] == 0
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_colour_is_auto_or_never(capsys, monkeypatch):
    unset(monkeypatch, "NO_COLOR")
    assert told(capsys, "list", "samplers", "--color", "never")[0] == 0
    assert os.environ["NO_COLOR"] == "1"
    assert told(capsys, "list", "samplers", "--color", "often")[0] == 2


def test_secrets_are_not_told(capsys, monkeypatch):
    for text in ("token=hf_abc", "{'api_key': 'hf_abc'}", "PASSWORD: hf_abc", "s3://hf_abc:x@b/c"):
        assert "hf_abc" not in redacted(text) and "***" in redacted(text)
    assert redacted("file:3: key: steps") == "file:3: key: steps"

    def failing(*_):
        raise RuntimeError("the token=hf_abc was refused")

    monkeypatch.setattr("sampler.runs.source.Source.model", failing)
    code, out, err = told(capsys, "generate", "a", "--debug", "--json")
    assert code == 1 and "Traceback" in err and "hf_abc" not in out + err


@pytest.mark.parametrize("build", [tiny.sd, tiny.sdxl, tiny.pixart])
def test_a_text_is_encoded_once_and_as_in_the_pair(build):
    """On each side: bit for bit what the adapter gives for prompt and negative together."""
    adapter = sampler.load(build()).pipeline
    texts, size = PromptCache(adapter), adapter.size(None, None)
    counted, encode = [], adapter.encode
    adapter.encode = lambda *arguments: (counted.append(arguments), encode(*arguments))[1]
    rows = [("a fox", ""), ("a dog", ""), ("a fox", "blue"), ("a dog", "blue"), ("a cat", "blue")]
    for prompt, negative in rows:
        ours, both = (
            texts.encode([prompt], [negative], True, size),
            encode([prompt], [negative], True, size),
        )
        pairs = zip(leaves((ours.cond, ours.uncond)), leaves((both.cond, both.uncond)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs if isinstance(a, torch.Tensor))
    assert [call[2] for call in counted] == [True, False, True, False]


def test_encoders_can_be_given_up_before_denoising(tmp_path):
    """The same bytes, with every text encoded before the first step and no encoder left."""
    made = engine()
    pipe = made.pipeline.pipe
    pipe.components, pipe.text_encoder = {"text_encoder": 1, "vae": 2}, object()
    seen = []
    made.pipeline.trouble = lambda adapter, x, cond: seen.append(
        (adapter.encoded, pipe.text_encoder)
    )
    options = WorkOptions(drop_encoders=True)
    make(tmp_path / "a", prompts(9), made, RunLocation(str(tmp_path / "a")), options)
    make(tmp_path / "b", prompts(9))
    assert pictures(tmp_path / "a") == pictures(tmp_path / "b")
    assert set(seen) == {(9, None)}


def test_the_bundled_model_without_its_encoder(capsys, tmp_path):
    line = ("generate", "a fox", "a dog", "--steps", 1, "--seed", 1, "-q", "-o")
    assert told(capsys, *line, tmp_path / "a")[0] == 0
    assert told(capsys, *line, tmp_path / "b", "--set", "model.drop_encoders=true")[0] == 0
    assert pictures(tmp_path / "a") == pictures(tmp_path / "b")
