"""The command line: what it prints, what it writes, how it fails, and what it does not import."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from sampler import registry
from sampler.bundled import FOLDER
from sampler.cli import main
from sampler.runs.metadata import CHUNK, read_record, scale_of

FAST = ("--steps", "2")


def run(capsys, *arguments):
    """(exit code, stdout, stderr) of a command line in this process."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def fails(capsys, *arguments):
    """(exit code, the one line on stderr) of a command line that must fail."""
    code, out, err = run(capsys, *arguments)
    assert code != 0 and out == ""
    assert err.count("\n") == 1 and err.startswith("sampler: "), err
    assert "Traceback" not in err
    return code, err


def names(folder):
    """The images of a run folder, or what else is in a folder."""
    folder = folder / "images" if (folder / "images").exists() else folder
    return sorted(os.listdir(folder)) if folder.exists() else []


def record(path):
    """The record inside an image."""
    with open(path, "rb") as stream:
        return read_record(stream.read())["record"]


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch, tmp_path):
    for name in ("SAMPLER_OUT", "SAMPLER_DEVICE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def test_images_are_written_with_their_records(capsys, tmp_path):
    out = tmp_path / "new" / "folder"
    code, stdout, stderr = run(
        capsys,
        "generate",
        "a fox on a red background",
        "a dog",
        "-n",
        2,
        "--seed",
        7,
        "-o",
        out,
        *FAST,
    )
    assert code == 0, stderr
    paths = stdout.splitlines()
    assert [os.path.basename(path) for path in paths] == names(out)
    assert [name[:7] for name in names(out)] == ["000000-", "000001-", "000002-", "000003-"]
    records = [record(path) for path in paths]
    assert [r["prompt"] for r in records] == ["a fox on a red background"] * 2 + ["a dog"] * 2
    assert [r["seed"] for r in records] == [7, 8, 7, 8]
    assert records[0]["steps"] == 2 and records[0]["guidance"]["scale"] == 3.0
    with Image.open(paths[0]) as image:
        assert json.loads(image.text[CHUNK])["libraries"]["torch"]
        assert str(tmp_path) not in json.dumps(image.text)
    with Image.open(paths[0]) as image:
        assert image.size == (records[0]["width"], records[0]["height"])


def test_the_images_are_those_of_the_python_interface(capsys, tmp_path):
    import sampler

    guidance = {"name": "cfg", "scale": 2.0, "rescale": 0.5}
    sets = [
        "--set",
        "guidance.scale=2",
        "--set",
        "guidance.rescale=0.5",
        "--set",
        "sampler.order=2",
    ]
    code, stdout, _ = run(
        capsys,
        "generate",
        "a fox",
        "-n",
        3,
        "--seed",
        1,
        "--batch-size",
        2,
        "-o",
        tmp_path / "o",
        "--sampler",
        "ab",
        *sets,
        *FAST,
    )
    assert code == 0
    expected = sampler.load().generate(
        "a fox",
        n=3,
        seeds=1,
        steps=2,
        batch_size=2,
        sampler={"name": "ab", "order": 2},
        guidance=guidance,
    )
    for path, image in zip(stdout.splitlines(), expected.images, strict=True):
        with Image.open(path) as written:
            assert written.tobytes() == image.tobytes()


def test_the_same_command_again_finds_everything_done(capsys, tmp_path):
    line = ("generate", "a fox", "--seed", 3, "-o", tmp_path / "o", *FAST)
    assert run(capsys, *line)[0] == 0
    first = {name: (tmp_path / "o/images" / name).read_bytes() for name in names(tmp_path / "o")}
    code, out, err = run(capsys, *line)
    assert code == 0 and "already" in err
    assert out.splitlines() == [f"{tmp_path}/o/images/{name}" for name in first]
    events = list(map(json.loads, run(capsys, *line, "--json")[1].splitlines()))
    assert [event["t"] for event in events] == ["plan", "item", "summary"]
    assert events[1]["existed"] is True and events[1]["file"] == out.strip()
    assert run(capsys, *line, "--new")[0] == 0
    again = tmp_path / "o-2" / "images"
    assert {name: (again / name).read_bytes() for name in os.listdir(again)} == first
    code, err = fails(capsys, *line, "--seed", 4)
    assert code == 4 and "seed" in err


def test_a_resumed_run_prints_every_image(capsys, tmp_path):
    """Those that exist first, then those that it makes."""
    line = ("generate", "a fox", "a dog", "--batch-size", 1, "-o", tmp_path / "o", *FAST)
    assert run(capsys, *line)[0] == 0
    first, second = names(tmp_path / "o")
    (tmp_path / "o" / "images" / first).unlink()
    for command in (line, ("resume", tmp_path / "o")):
        code, out, _ = run(capsys, *command)
        assert code == 0 and len(out.splitlines()) == 2
    assert sorted(map(os.path.basename, out.splitlines())) == [first, second]


def test_a_scale_is_an_option(capsys, tmp_path):
    """Of the default rule, of a named one and of the one inside it, over the configuration."""
    out = iter(range(100))

    def scales(*arguments):
        code, text, err = run(capsys, "generate", *arguments, "-o", str(next(out)), "--steps", 1)
        assert code == 0, err
        return [scale_of(record(path)["guidance"]) for path in sorted(text.splitlines())]

    assert scales("a", "--scale", 7) == [7.0]
    assert scales("a", "--cfg-scale", 2.5, "--guidance", "apg") == [2.5]
    assert scales("a", "--scale", 4, "--guidance", "adaptive") == [4.0]
    (tmp_path / "c.yaml").write_text("guidance: {name: cfg, scale: 9, rescale: 0.5}\n")
    assert scales("a", "-c", "c.yaml", "--scale", 2) == [2.0]
    (tmp_path / "p.jsonl").write_text(
        '{"prompt": "a"}\n{"prompt": "a", "guidance": "apg"}\n{"prompt": "a", "scale": 1.5}\n'
        '{"prompt": "a", "guidance": {"name": "apg", "scale": 3}}\n'
    )
    assert scales("--prompts", "p.jsonl", "--scale", 6) == [6.0, 6.0, 1.5, 3.0]
    code, line = fails(capsys, "generate", "a", "--scale", 2, "--guidance", "none", "-o", "no")
    assert (code, "'none' has no scale" in line) == (2, True)
    code, line = fails(capsys, "generate", "a", "--scale", "-1", "-o", "no")
    assert (code, "scale = -1" in line) == (2, True)


@pytest.mark.parametrize("option", ["--negative-prompt", "--negative"])
def test_a_negative_prompt_is_an_option(capsys, option):
    code, out, _ = run(capsys, "generate", "a", option, "a cat", "-o", "out", "--steps", 1)
    assert code == 0 and record(out.strip())["negative_prompt"] == "a cat"


def test_basic_metadata_is_shown_and_replayed_from_its_run(capsys, tmp_path):
    line = ("generate", "a fox", "--metadata", "basic", "--seed", 3, "-o", "out", *FAST)
    image = run(capsys, *line)[1].strip()
    code, out, _ = run(capsys, "show", image)
    assert code == 0 and set(json.loads(out)) == {"key", "seed", "sampler", "guidance"}
    assert json.loads(out)["seed"] == 3
    code, _, err = run(capsys, "replay", image, "-o", "again.png")
    assert code == 0 and "no pixel differs" in err
    shutil.copy(image, tmp_path / "alone.png")
    code, line = fails(capsys, "replay", "alone.png", "-o", "third.png")
    assert code == 2 and "not its record" in line and "RUN#KEY" in line


def test_usage_errors_are_events_too(capsys):
    for arguments in (["generate", "a", "--stesp", 3], ["genrate"], ["generate", "--sampler", "x"]):
        code, out, err = run(capsys, *arguments, "--json")
        event = json.loads(out)
        assert (code, event["t"], event["code"]) == (2, "error", 2)
        assert err == f"sampler: {event['message']}\n"


def test_the_shipped_configurations_are_valid(capsys, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    configs = Path("configs")
    files = [*configs.glob("*.yaml"), *configs.glob("finetune/*.yaml")]
    code, out, err = run(capsys, "validate", *files)
    assert code == 0, err
    kinds = {line.partition(": ok, ")[2] for line in out.splitlines()}
    assert kinds == {"a configuration", "a fine-tuning configuration"}
    assert len(out.splitlines()) == len(files)


def test_a_fine_tuning_configuration_is_checked_as_one(capsys, tmp_path):
    (tmp_path / "t.yaml").write_text("reward: brightness\nfit: {updtes: 3}\n")
    code, line = fails(capsys, "validate", "t.yaml")
    assert code == 2 and "t.yaml:2" in line and "did you mean 'updates'" in line


def test_events_are_json_lines(capsys, tmp_path):
    code, stdout, _ = run(
        capsys,
        "generate",
        "a fox",
        "-n",
        3,
        "--batch-size",
        2,
        "--json",
        "-q",
        "-o",
        tmp_path / "o",
        *FAST,
    )
    assert code == 0
    events = [json.loads(line) for line in stdout.splitlines()]
    events = [event for event in events if event["t"] != "progress"]  # one per 10 s, if it lasts
    assert [event["t"] for event in events] == ["plan", "item", "item", "item", "summary"]
    assert all(event["v"] == 1 and event["time"] > 0 for event in events)
    assert (events[0]["images"], events[0]["batches"], events[0]["batch_size"]) == (3, 2, 2)
    assert [event["nfe"] for event in events[1:-1]] == [4, 4, 4]
    assert all(os.path.isfile(event["file"]) for event in events[1:-1])
    assert (events[-1]["done"], events[-1]["failed"]) == (3, 0)


def test_prompts_from_a_file_and_a_configuration(capsys, tmp_path):
    (tmp_path / "p.txt").write_text("a dog\n# no\na cat\n")
    (tmp_path / "c.yaml").write_text(
        "run: {steps: 2}\nprompts: {file: p.txt}\nguidance: none\n"
        "output: {dir: out, metadata: basic}\n"
    )
    code, stdout, _ = run(capsys, "generate", "-c", "c.yaml", "-q")
    assert code == 0 and len(names(tmp_path / "out")) == 2
    with Image.open(stdout.splitlines()[0]) as image:
        assert set(json.loads(image.text[CHUNK])) == {"key", "seed", "sampler", "guidance"}
    code, stdout, _ = run(capsys, "generate", "-c", "c.yaml", "a fox", "--prompts", "p.txt",
                          "--set", "output.metadata=full", "-o", "out2")  # fmt: skip
    assert [record(p)["prompt"] for p in stdout.splitlines()] == ["a fox", "a dog", "a cat"]
    code, stdout, _ = run(capsys, "generate", "-c", "c.yaml", "a fox", "-o", "out3",
                          "--set", "output.metadata=none")  # fmt: skip
    with Image.open(stdout.splitlines()[0]) as image:
        assert code == 0 and not image.info


def test_the_environment_names_the_folder(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("SAMPLER_OUT", "from_environment")
    assert run(capsys, "generate", "a fox", *FAST)[0] == 0
    assert len(names(tmp_path / "from_environment")) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["a", "--sampler", "ddmi"], 2, "Unknown sampler 'ddmi' (did you mean 'ddim'?)"),
        (["a", "--guidance", "cfgg"], 2, "did you mean 'cfg'"),
        (["a", "--set", "guidance.scal=3"], 2, "no field 'scal' (did you mean 'scale'?)"),
        (["a", "--set", "guidance.scale=nan"], 2, "scale = 'nan'"),
        (["a", "--set", "guidance.scale=.nan"], 2, "not a finite number"),
        (["a", "--set", "guidance.scale=-1"], 2, "scale = -1"),
        (["a", "--set", "runn.steps=3"], 2, "did you mean 'run'"),
        (["a", "--set", "steps"], 2, "a.b=value"),
        (["a", "--steps", "0"], 2, "--steps: run.steps = 0"),
        (["a", "--steps", "1001"], 2, "must be an integer from 1 to 1000"),
        (["a", "--steps", "many"], 2, "--steps"),
        (["a", "-n", "0"], 2, "run.n = 0"),
        (["a", "--seed", "-1"], 2, "run.seed = -1"),
        (["a", "--width", "12"], 2, "width = 12"),
        (["a", "--executor", "clod"], 2, "'clod' is not one of 'local', 'torchrun', 'ray'"),
        (["a", "--axis", "stepz=1,2"], 2, "did you mean 'steps'"),
        (["a", "--name-template", "{promt}"], 2, "{promt}"),
        (["a", "--batch-size", "some"], 2, "run.batch_size"),
        (["a", "--dtype", "int8"], 2, "'--dtype': 'int8' is not one of"),
        (["a", "--device", "abacus"], 2, "'abacus'; known: auto, cpu, cuda"),
        (["a\x07b"], 2, "control character U+0007"),
        ([], 2, "No prompts"),
        (["--prompts", "missing.txt"], 2, "missing.txt: no such file"),
        (["--prompts", "empty.txt"], 2, "No prompts"),
        (["-c", "missing.yaml"], 2, "missing.yaml: no such file"),
        (["-c", "bad.yaml"], 2, "bad.yaml:2: run.stpes: unknown key (did you mean 'steps'?)"),
        (["a", "--stesp", "3"], 2, "--steps"),
        (["a", "--model", "missing"], 6, "missing"),
        (["a", "--model", "folder"], 6, "folder"),
        (["a", "-o", "empty.txt"], 5, "empty.txt is a file"),
        (["a", "-o", "empty.txt/below"], 5, "empty.txt is a file"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence_and_writes_nothing(capsys, tmp_path, arguments, code, words):
    (tmp_path / "empty.txt").write_text("# nothing\n")
    (tmp_path / "bad.yaml").write_text("run:\n  stpes: 3\n")
    (tmp_path / "folder").mkdir()
    before = names(tmp_path)
    out = () if "-o" in arguments else ("-o", "out")
    found, line = fails(capsys, "generate", *arguments, *out)
    assert (found, words in line) == (code, True), (found, line)
    assert names(tmp_path) == before


def test_pickled_weights_are_refused(capsys, tmp_path):
    import torch

    shutil.copytree(FOLDER / "pipeline", tmp_path / "m")
    weights = tmp_path / "m" / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save({}, weights.with_suffix(".bin"))
    weights.unlink()
    code, _ = fails(capsys, "generate", "a", "--model", tmp_path / "m", "-o", "out")
    assert code == 6 and not (tmp_path / "out").exists()


def test_failures_of_single_images_do_not_harm_the_others(capsys, tmp_path, monkeypatch):
    from sampler.pipelines.base import Adapter

    real, calls = Adapter.decode, []

    def decode(self, latents):
        calls.append(1)
        if len(calls) == 2:
            raise error
        return real(self, latents)

    monkeypatch.setattr(Adapter, "decode", decode)
    arguments = ("generate", "a fox", "-n", 3, "--batch-size", 1, "-q", *FAST)
    cases = [(130, KeyboardInterrupt(), 1), (3, MemoryError(), 2), (3, RuntimeError("odd"), 2)]
    for number, (code, error, there) in enumerate(cases):
        calls.clear()
        found, out, err = run(capsys, *arguments, "-o", tmp_path / str(number))
        assert found == code, err
        assert len(out.splitlines()) == len(names(tmp_path / str(number))) == there
        calls.clear()
        assert run(capsys, "resume", tmp_path / str(number), "--retry-errors", "-q")[0] == (
            130 if number == 0 else 0
        )
    journal = (tmp_path / "2" / "journal.jsonl").read_text()
    assert "RuntimeError: odd" in journal
    calls.clear()
    error = RuntimeError("odd")
    assert run(capsys, *arguments, "--strict", "-o", tmp_path / "strict")[0] == 1


def test_out_of_memory_for_every_image_has_its_own_code(capsys, tmp_path, monkeypatch):
    from sampler.pipelines.base import Adapter

    def decode(self, latents):
        raise MemoryError

    monkeypatch.setattr(Adapter, "decode", decode)
    assert run(capsys, "generate", "a fox", "-n", 2, "-q", "-o", tmp_path / "o", *FAST)[0] == 7


def test_images_that_are_not_finite_are_not_written(capsys, tmp_path, monkeypatch):
    from sampler.engine import Engine

    real = Engine.run_to_end

    def finished(self, *arguments, **options):
        x, snap = real(self, *arguments, **options)
        x[1] = float("nan")
        return x, snap

    monkeypatch.setattr(Engine, "run_to_end", finished)
    code, out, err = run(capsys, "generate", "a", "b", "c", "-o", tmp_path / "o", *FAST)
    assert code == 3 and len(out.splitlines()) == len(names(tmp_path / "o")) == 2
    assert "image 1: nonfinite" in err and "1 image failed" in err


@pytest.mark.parametrize("kind", ["samplers", "guidance", "rewards", "trainers"])
def test_lists_tell_every_name_and_field(capsys, kind):
    singular = "guidance" if kind == "guidance" else kind.removesuffix("s")
    code, out, _ = run(capsys, "list", kind, "--json")
    assert code == 0
    entries = {entry["name"]: entry for entry in map(json.loads, out.splitlines())}
    assert list(entries) == registry.names(singular)
    for name, entry in entries.items():
        described = registry.describe(singular, name)
        assert [f["name"] for f in entry["fields"]] == [f["name"] for f in described["fields"]]
        assert entry["summary"] and entry["t"] == "entry"
    code, table, _ = run(capsys, "list", singular)
    assert code == 0 and all(name in table for name in entries)


def test_the_listed_schedulers_are_those_that_can_be_read(capsys):
    import diffusers

    from sampler.core.stock_schedule import schedule_of

    entries = [
        json.loads(line) for line in run(capsys, "list", "schedulers", "--json")[1].splitlines()
    ]
    words = {"vp": "variance preserving", "edm": "Karras", "flow": "flow matching",
             "consistency": "consistency model"}  # fmt: skip
    for entry in entries:
        options = {"stages": 1} if entry["name"] == "HeliosScheduler" else {}
        sde = entry["name"].startswith("Cosine")  # its class needs torchsde
        config = {} if sde else getattr(diffusers, entry["name"])(**options).config
        assert words[schedule_of(config, entry["name"]).process] in entry["summary"]
    assert len(entries) > 10


def test_an_unknown_kind_suggests_the_nearest(capsys):
    code, line = fails(capsys, "list", "smplers")
    assert code == 2 and "did you mean 'samplers'" in line


def test_the_doctor_tells_versions_devices_and_space(capsys):
    code, out, _ = run(capsys, "doctor", "--json")
    rows = {row["name"]: row for row in map(json.loads, out.splitlines())}
    assert code == 0 and {"python", "torch", "diffusers", "cpu", "free disk here"} <= set(rows)
    assert rows["torch"]["ok"] and "requires >=2.10" in rows["torch"]["value"]
    assert "torch" in run(capsys, "doctor")[1]


def test_wrong_commands_are_usage_errors(capsys):
    assert "generate" in fails(capsys, "genrate")[1]
    assert fails(capsys, "generate", "a", "--set")[0] == 2
    code, out, _ = run(capsys, "--help")
    assert code == 0 and "generate" in out


HEAVY = ("torch", "diffusers", "transformers", "accelerate", "triton", "PIL", "yaml", "numpy")


@pytest.mark.parametrize(
    "line",
    ["--help", "generate --help", "list samplers", "list guidance --json", "list schedulers"],
)
def test_light_commands_import_nothing_heavy(line):
    code = (
        "import sys\nfrom sampler.cli import main\n"
        f"code = main({line.split()!r})\n"
        f"print([n for n in {HEAVY!r} if n in sys.modules], file=sys.stderr)\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.strip()) == (0, "[]"), done.stderr
    assert done.stdout


def test_configuration_errors_come_before_torch_is_imported():
    code = (
        "import sys\nfrom sampler.cli import main\n"
        "code = main(['generate', 'a', '--set', 'guidance.scal=3'])\n"
        "print('torch' in sys.modules)\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "False\n")


def test_the_console_script_reports_its_code(tmp_path):
    script = os.path.join(os.path.dirname(sys.executable), "sampler")
    if not os.path.exists(script):
        pytest.skip("the package is not installed beside this interpreter")
    done = subprocess.run([script, "list", "nothing"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    reader = subprocess.run(f"{script} list samplers --json | head -c 1", shell=True,
                            capture_output=True, text=True, timeout=60)  # fmt: skip
    assert reader.stderr == ""
