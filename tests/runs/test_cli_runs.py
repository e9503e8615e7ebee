"""The commands over run folders, as a user types them; every exit code."""

import csv
import html
import json
import os
import re
import subprocess
import sys
import tarfile
import tokenize
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sampler.cli import main
from sampler.cli.open_run import open_run
from sampler.core.errors import SamplerError
from sampler.runs import metadata, png
from tests.runs.stub import is_intact

ROOT = Path(__file__).parents[2]
HOSTILE = '<script>alert(1)</script> "a" & <b>fox</b>'


def run(capsys, *arguments):
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of the bundled model from a csv with settings per row, and a sweep."""
    where = tmp_path_factory.mktemp("cli")
    with open(where / "p.csv", "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["prompt", "negative_prompt", "seed", "steps", "scale", "tag", "meta_note"])
        writer.writerow(["a red apple on a blue background", "blurry", 1, 3, 2, "x", "=1+1"])
        writer.writerow([HOSTILE, "", 2, 2, "", "=cmd()", "n"])
        writer.writerow(["a fox", "", 3, 2, "", "y", "n"])
        writer.writerow(["a fox", "", 3, 2, "", "y", "n"])
    line = ["generate", "--prompts", str(where / "p.csv"), "-o", str(where / "run"), "-q"]
    assert main([*line, "--batch-size", "2"]) == 0
    sweep = ["sweep", "a fox", "--axis", "guidance=cfg,none", "--axis", "steps=1..3", "-q"]
    assert main([*sweep, "-o", str(where / "sweep")]) == 0
    return where


def test_verify_and_repair(capsys, folder):
    assert run(capsys, "verify", folder / "run")[0] == 0
    image = sorted((folder / "run/images").iterdir())[1]
    good = image.read_bytes()
    image.write_bytes(good[:-30])
    code, out, err = run(capsys, "verify", folder / "run")
    assert code == 3 and image.name in out and "resume" in err
    assert run(capsys, "resume", folder / "run", "--repair")[0] == 0
    assert image.read_bytes() == good
    assert run(capsys, "verify", folder / "run", "--json")[0] == 0


def test_resume_of_what_is_no_run(capsys, tmp_path):
    for line in (
        ["resume"],
        ["verify"],
        ["show"],
        ["grid"],
        ["gallery"],
        ["export", "--to", "csv"],
    ):
        code, _, err = run(capsys, line[0], tmp_path / "none", *line[1:])
        assert code == 2 and err.count("\n") == 1 and "run folder" in err
        assert not (tmp_path / "none").exists()


def test_show_tells_records_counts_and_failures(capsys, folder):
    code, out, err = run(capsys, "show", folder / "run")
    assert code == 0 and len(out.splitlines()) == 3 and "3 ok, 0 error" in err
    assert run(capsys, "show", folder / "run", "--errors")[1] == ""
    record = json.loads(run(capsys, "show", f"{folder / 'run'}#1")[1])
    assert record["prompt"] == HOSTILE and record["tag"] == "=cmd()"
    events = [json.loads(x) for x in run(capsys, "show", folder / "run", "--json")[1].splitlines()]
    assert events[2]["lines"] == [2, 3] and events[-1]["duplicates"] == 1
    image = sorted((folder / "run/images").iterdir())[0]
    inside = json.loads(run(capsys, "show", image)[1])
    assert inside["record"]["guidance"]["scale"] == 2.0
    assert run(capsys, "show", f"{folder / 'run'}#zz")[0] == 2


def test_an_image_says_how_it_was_made_to_us_and_to_web_uis(folder):
    image = sorted((folder / "run/images").iterdir())[0]
    with Image.open(image) as opened:
        text = opened.text["parameters"].splitlines()
    assert text[0] == "a red apple on a blue background"
    assert text[1] == "Negative prompt: blurry"
    assert re.match(r"Steps: 3, Sampler: ddim, CFG scale: 2.0, Seed: 1, Size: 64x64, ", text[2])
    assert str(folder) not in str(image.read_bytes())


def test_a_replayed_image_is_bit_equal(capsys, folder, tmp_path):
    image = sorted((folder / "run/images").iterdir())[2]
    line = ("replay", image, "-o", tmp_path / "again.png")
    code, out, err = run(capsys, *line)
    assert code == 0 and "no pixel differs" in err
    assert (tmp_path / "again.png").read_bytes() == image.read_bytes()
    assert run(capsys, *line)[0] == 2, "no file is replaced"
    alone = tmp_path / "alone.png"
    alone.write_bytes(image.read_bytes())
    code, out, err = run(capsys, "replay", alone, "-o", tmp_path / "x.png", "--json")
    assert code == 0 and json.loads(out)["difference"] <= 1
    with Image.open(alone) as opened:
        opened.save(tmp_path / "bare.png")
    assert run(capsys, "replay", tmp_path / "bare.png")[0] == 2
    assert run(capsys, "replay", tmp_path / "missing.png")[0] == 2


def test_what_a_prompt_file_leaves_open_is_noted_once(capsys, tmp_path):
    (tmp_path / "p.txt").write_text("a fox\na fox\n{red|blue} fox\na dog\na fox\n")
    line = ["generate", "--prompts", tmp_path / "p.txt", "--steps", 1, "-o", tmp_path / "run"]
    code, out, err = run(capsys, *line)
    assert code == 0 and len(out.splitlines()) == 3
    assert err.count("2 images are equal to earlier ones and generated once") == 1
    assert err.count("1 prompt holds {a|b} or __name__, which stay text; --expand") == 1
    code, out, err = run(capsys, *line[:-1], tmp_path / "other", "--expand", "random")
    assert code == 0 and "--expand" not in err


def test_a_negative_prompt_that_no_rule_evaluates_is_noted(capsys, tmp_path):
    line = ["generate", "a fox", "--negative", "red", "--dry-run"]
    assert "the negative prompt has no effect" in run(capsys, *line, "--guidance", "none")[2]
    assert "no effect" in run(capsys, *line, "--scale", "1")[2]  # cfg that evaluates one branch
    assert run(capsys, *line, "--guidance", "nag")[2] == ""
    assert run(capsys, *line)[2] == ""


def test_a_random_seed_is_drawn_once_and_recorded(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = ["generate", "a fox", "--steps", 1, "--seed", "random"]
    code, _, err = run(capsys, *line, "-o", "run")
    (seed,) = re.findall(r"the seed (\d+) was drawn at random \(--seed \1 repeats it\)", err)
    image = next(Path("run/images").iterdir())
    assert code == 0 and metadata.read_record(image.read_bytes())["record"]["seed"] == int(seed)
    code, _, err = run(capsys, *line, "-o", "run")
    assert code == 0 and seed in err and "already" in err, "the same command resumes the run"
    assert run(capsys, *line[:-1], seed, "-o", "same")[0] == 0
    assert next(Path("same/images").iterdir()).read_bytes() == image.read_bytes()
    assert run(capsys, *line, "-q")[0] == run(capsys, *line, "-q")[0] == 0
    assert len(list(Path("runs").iterdir())) == 2, "without -o, every call draws"


def test_a_grid_is_an_option_an_axis_a_column_and_part_of_the_record(capsys, tmp_path):
    (tmp_path / "p.csv").write_text("prompt,grid\na fox,\na fox,karras\n")
    line = ("generate", "--prompts", tmp_path / "p.csv", "--seed", 1, "--steps", 2)
    assert run(capsys, *line, "--grid", "beta", "-o", tmp_path / "r")[0] == 0
    found = [json.loads(run(capsys, "show", f"{tmp_path / 'r'}#{k}")[1])["grid"] for k in range(2)]
    assert found == ["beta", "karras"]
    file = next((tmp_path / "r/images").glob("000001-*"))
    assert json.loads(run(capsys, "show", file)[1])["record"]["grid"] == "karras"
    code, out, _ = run(capsys, "replay", f"{tmp_path / 'r'}#1", "-o", tmp_path / "again.png")
    assert code == 0 and (tmp_path / "again.png").read_bytes() == file.read_bytes()
    swept = ("sweep", "a fox", "--axis", "grid=simple,beta", "--seed", 1, "--steps", 2)
    assert run(capsys, *swept, "-o", tmp_path / "s")[0] == 0
    images = [path.read_bytes() for path in (tmp_path / "s/images").iterdir()]
    assert len(images) == 2 and len(set(images)) == 2
    code, _, err = run(capsys, "generate", "a", "--grid", "kaaras", "-o", tmp_path / "bad")
    assert code == 2 and "did you mean 'karras'?" in err and not (tmp_path / "bad").exists()


def test_grids_have_a_cell_for_every_combination(capsys, folder):
    code, out, _ = run(capsys, "grid", folder / "sweep")
    assert code == 0 and len(out.splitlines()) == 1
    wide = np.asarray(Image.open(out.strip()))
    code, out, _ = run(capsys, "grid", folder / "sweep", "--x", "guidance")
    high = np.asarray(Image.open(out.strip()))
    assert wide.shape[1] > high.shape[1] and high.shape[0] > wide.shape[0]
    assert run(capsys, "grid", folder / "run")[0] == 0
    assert run(capsys, "grid", folder / "sweep", "--x", "seed")[0] == 2


def test_every_cell_of_a_sweep_shows_its_own_image(capsys, tmp_path, monkeypatch):
    """Seed 0 with two images and seed 1 with two are three images in four cells."""
    from sampler.runs import grid
    from sampler.runs.records import images

    prompt = "a fox\nin the snow"
    line = ["sweep", prompt, "--axis", "seed=0,1", "-n", 2, "--steps", 1, "-o", tmp_path / "run"]
    code, out, err = run(capsys, *line)
    assert code == 0 and len(out.splitlines()) == 3 and "1 image is equal" in err
    opened = open_run(str(tmp_path / "run"))
    file_of = {record["seed"]: data for record, data in images(opened)}
    assert run(capsys, "grid", tmp_path / "run")[0] == 0
    drawn = []
    monkeypatch.setattr(grid, "drawn", lambda sheet: drawn.append(sheet) or b"")
    grid.sheets(opened)
    assert [sheet.title for sheet in drawn] == ["a fox in the snow", "a fox in the snow   copy 2"]
    assert [sheet.columns for sheet in drawn] == [["0", "1"]] * 2
    assert drawn[0].cells == {(0, 0): file_of[0], (0, 1): file_of[1]}
    assert drawn[1].cells == {(0, 0): file_of[1], (0, 1): file_of[2]}


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)


def test_the_gallery_is_escaped_and_has_no_script(capsys, folder):
    code, out, _ = run(capsys, "gallery", folder / "run")
    text = Path(out.strip()).read_text()
    page = Page()
    page.feed(text)
    assert code == 0 and page.tags.count("img") == page.tags.count("article") == 3
    allowed = {"html", "head", "meta", "title", "style", "body", "header", "h1", "p", "form",
               "input",
               "fieldset", "legend", "label", "main", "article", "a", "img", "small", "details",
               "summary", "pre"}  # fmt: skip
    assert set(page.tags) <= allowed
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert any("default-src 'none'" in (value or "") for _, value in page.attributes)
    assert HOSTILE in html.unescape(text) and HOSTILE not in text
    for _, value in page.attributes:
        assert "javascript:" not in (value or "")
    links = [value for name, value in page.attributes if name == "src"]
    assert all((folder / "run" / link).is_file() for link in links)


def test_exports(capsys, folder, tmp_path):
    code, out, _ = run(capsys, "export", folder / "run", "--to", "csv", "-o", tmp_path / "r.csv")
    with open(tmp_path / "r.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert code == 0 and [row["prompt"] for row in rows] == [
        "a red apple on a blue background", HOSTILE, "a fox"]  # fmt: skip
    assert rows[0]["meta_note"] == "'=1+1" and rows[1]["tag"] == "'=cmd()"
    assert run(capsys, "export", folder / "run", "--to", "xls")[0] == 2
    assert run(capsys, "export", folder / "run", "--to", "webdataset", "-o", tmp_path / "w")[0] == 0
    with tarfile.open(tmp_path / "w" / "000000.tar") as archive:
        assert len(archive.getnames()) == 9 and archive.getmembers()[0].mtime == 0
    parquet = pytest.importorskip("pyarrow.parquet")
    assert run(capsys, "export", folder / "sweep", "--to", "parquet")[0] == 0
    table = parquet.read_table(folder / "sweep" / "results.parquet").to_pylist()
    assert [row["axis_steps"] for row in table] == [1, 2, 3, 1, 2, 3]


def test_validate_and_schema(capsys, tmp_path, folder):
    (tmp_path / "good.yaml").write_text("run: {steps: 3}\n")
    (tmp_path / "bad.csv").write_text("prompt,steps\na,x\nb,3\nc,0\n")
    code, out, _ = run(capsys, "validate", tmp_path / "good.yaml", folder / "p.csv")
    assert code == 0 and "4 lines, 3 images" in out
    code, out, err = run(capsys, "validate", tmp_path / "bad.csv")
    assert code == 2 and "bad.csv:2" in err and "bad.csv:4" in err
    schema = json.loads(run(capsys, "config", "schema")[1])
    assert schema["additionalProperties"] is False and "sampler" in schema["properties"]


def test_a_dry_run_writes_nothing(capsys, folder, tmp_path):
    line = ("generate", "--prompts", folder / "p.csv", "--dry-run", "-o", tmp_path / "o")
    code, out, _ = run(capsys, *line)
    assert code == 0 and "3 images (1 duplicate removed)" in out and "network evaluations" in out
    assert not (tmp_path / "o").exists()
    event = json.loads(run(capsys, *line, "--json")[1])
    assert event["nfe"] == 14 and event["first"].startswith("images/000000-")


@pytest.mark.parametrize("where", [[], ["-o", "run"]])
def test_the_prompt_file_is_read_and_planned_once(tmp_path, monkeypatch, where):
    from sampler.runs import tables
    from sampler.runs.planner import Planner

    counts = {"read_table": 0, "Planner.jobs": 0}

    def counted(name, function):
        def call(*arguments, **options):
            counts[name] += 1
            return function(*arguments, **options)

        return call

    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.csv").write_text("prompt,seed\na fox,1\na dog,2\n")
    monkeypatch.setattr(tables, "read_table", counted("read_table", tables.read_table))
    monkeypatch.setattr(Planner, "jobs", counted("Planner.jobs", Planner.jobs))
    assert main(["generate", "--prompts", "p.csv", "--steps", "1", "-q", *where]) == 0
    assert counts == {"read_table": 1, "Planner.jobs": 1}


def test_a_prompt_file_is_planned_once(capsys, tmp_path, monkeypatch):
    """Also without -o, where the name of the folder comes from the plan."""
    from sampler.runs import planner

    parsed, parse = [], planner.parse_line
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(planner, "parse_line", lambda *a: parsed.append(a) or parse(*a))
    (tmp_path / "p.txt").write_text("a fox\na dog\n")
    assert run(capsys, "generate", "--prompts", "p.txt", "--steps", 1)[0] == 0
    assert len(parsed) == 2


def test_a_run_without_a_folder_finds_its_own_again(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = ("generate", "a Fox, running", "--steps", 1)
    assert run(capsys, *line)[0] == 0
    (made,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-a-fox-running-[0-9a-f]{4}", made.name)
    code, out, err = run(capsys, *line)
    assert code == 0 and out.startswith(f"runs/{made.name}/images/") and "already" in err
    assert run(capsys, *line, "--new")[0] == 0 and len(list((tmp_path / "runs").iterdir())) == 2


def test_a_run_of_another_model_is_not_gone_on_with(capsys, folder, tmp_path):
    import shutil

    shutil.copytree(folder / "run", tmp_path / "run")
    facts = tmp_path / "run" / "run.json"
    facts.write_text(facts.read_text().replace('"files:', '"files:0'))
    next((tmp_path / "run" / "images").iterdir()).unlink()
    code, _, err = run(capsys, "resume", tmp_path / "run")
    assert code == 6 and "another model" in err


def test_the_executors_are_chosen_on_the_command_line(capsys, tmp_path, monkeypatch):
    line = ("generate", "a fox", "--steps", 1, "--seed", 1, "-q", "-o")
    assert run(capsys, *line, tmp_path / "a")[0] == 0
    monkeypatch.delenv("RANK", raising=False)
    code, _, err = run(capsys, *line, tmp_path / "b", "--executor", "torchrun")
    assert code == 2 and "start it with torchrun" in err
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert run(capsys, *line, tmp_path / "b", "--executor", "torchrun")[0] == 0
    (one,), (other,) = ((tmp_path / name / "images").iterdir() for name in "ab")
    assert one.read_bytes() == other.read_bytes()
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, err = run(capsys, *line, tmp_path / "c", "--executor", "ray")
    assert code == 2 and "extra 'ray'" in err


def test_light_commands_load_no_model(folder, tmp_path):
    out = folder / "run"
    lines = [["show", str(out)], ["verify", str(out)], ["gallery", str(out)], ["resume", str(out)],
             ["validate", str(folder / "p.csv")], ["config", "schema"],
             ["export", str(out), "--to", "csv", "-o", str(tmp_path / "r.csv")],
             ["generate", "a", "--dry-run"]]  # fmt: skip
    code = (
        "import sys\nfrom sampler.cli import main\n"
        f"codes = [main(line) for line in {lines!r}]\n"
        "found = [n for n in ('torch', 'diffusers', 'transformers') if n in sys.modules]\n"
        "print(codes, found, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.stderr.splitlines()[-1] == f"{[0] * len(lines)} []", done.stderr


def test_python_uses_the_same_folder(tmp_path):
    import sampler

    engine = sampler.load()
    result = engine.generate(["a fox", "a dog", "a fox"], seeds=[1, 2, 1], steps=2, batch_size=2,
                             out=tmp_path / "run")  # fmt: skip
    assert len(result.images) == 3 and result.images[0].size == (64, 64)
    assert result.images[0].tobytes() == result.images[2].tobytes()
    again = engine.generate(**result.config)
    assert [a.tobytes() for a in again.images] == [b.tobytes() for b in result.images]
    plain = engine.generate(["a fox"], seeds=[1], steps=2)
    difference = np.asarray(plain.images[0], int) - np.asarray(result.images[0], int)
    assert abs(difference).max() <= 1
    with pytest.raises(SamplerError) as caught:
        engine.generate(["a cat"], steps=2, out=tmp_path / "run")
    assert caught.value.code == 4
    with pytest.raises(ValueError, match="out="):
        engine.generate(["a cat"], steps=2, out=tmp_path / "run", output="latent")
    assert main(["resume", str(tmp_path / "run"), "-q"]) == 0


def test_png_bytes_with_and_without_isal(monkeypatch):
    rng = np.random.default_rng(0)
    for shape in ((1, 1, 3), (7, 5, 3), (64, 64, 3)):
        pixels = rng.integers(0, 256, shape, dtype=np.uint8)
        texts = {"sampler": "ü" * 50, "parameters": "a\nb"}
        fast = png.encode(pixels, texts)
        assert fast == png.encode(pixels, texts) and is_intact(fast)
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "isal", None)
            slow = png.encode(pixels, texts)
        for data in (fast, slow):
            found, inside = png.decode(data)
            assert np.array_equal(found, pixels) and inside == texts
        assert not is_intact(fast[:-1]) and not is_intact(b"")


@pytest.mark.parametrize("seed", range(4))
def test_mutated_images_are_refused_or_read_never_more(folder, seed):
    data = sorted((folder / "run/images").iterdir())[0].read_bytes()
    rng = np.random.default_rng(seed)
    for _ in range(60):
        bad = bytearray(data)
        for place in rng.integers(0, len(bad), rng.integers(1, 8)):
            bad[place] = rng.integers(0, 256)
        if rng.integers(0, 2):
            del bad[rng.integers(0, len(bad)) :]
        try:
            body = metadata.read_record(bytes(bad))
            assert metadata.key_of(body["record"]) == body["key"]
        except SamplerError as error:
            assert error.code == 2 and "\n" not in str(error)


def test_nothing_here_evaluates_text():
    """No eval, exec, pickle, shell or str.format on user text in what is shipped.

    The one exec is of a function that `matching.py` writes from the structure of formulas: its
    source has positions, operation codes and shapes in it, and no text from outside.
    """
    calls = {"eval", "exec", "pickle", "cPickle", "dill", "marshal", "shelve", "system", "popen"}
    bad = []
    for path in [*(ROOT / "sampler").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        with tokenize.open(path) as stream:
            tokens = list(tokenize.generate_tokens(stream.readline))
        for before, token, after in zip(tokens, tokens[1:], tokens[2:], strict=False):
            call = token.type == tokenize.NAME and token.string in calls
            method = before.string == "." and token.string == "eval"  # nn.Module.eval()
            written = path.name == "matching.py" and token.string == "exec"
            if (
                call
                and not method
                and not written
                and (after.string == "(" or before.string in ("import", "."))
            ):
                bad.append(f"{path.name}:{token.start[0]} {token.string}")
            if token.string == "shell" and after.string == "=":
                bad.append(f"{path.name}:{token.start[0]} shell=")
    assert bad == []


def test_no_home_is_named_in_what_is_written(folder):
    for path in (folder / "run").rglob("*"):
        if path.is_file() and path.name not in (".lock", "run.json"):
            assert os.path.expanduser("~") + "/" not in path.read_bytes().decode("latin-1")


def test_samplers_by_the_names_of_other_programs(capsys, tmp_path):
    (tmp_path / "p.csv").write_text(
        "prompt,sampler\na fox,\na fox,Euler a\na fox,uni_pc_bh2 beta\n"
    )
    line = ("generate", "--prompts", tmp_path / "p.csv", "--seed", 1, "--steps", 2)
    assert run(capsys, *line, "--sampler", "DPM++ 2M Karras", "-o", tmp_path / "r")[0] == 0
    records = [json.loads(run(capsys, "show", f"{tmp_path / 'r'}#{k}")[1]) for k in range(3)]
    names = [record["sampler"]["name"] for record in records]
    assert names == ["dpmpp_2m", "euler_ancestral", "unipc"]
    assert [record["grid"] for record in records] == ["karras", "karras", "beta"]
    code, _, err = run(capsys, "generate", "a", "--sampler", "DPM adaptive", "-o", tmp_path / "b")
    assert code == 2 and "the nearest is 'dpmpp_2m'" in err and not (tmp_path / "b").exists()
