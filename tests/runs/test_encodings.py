"""Images as PNG, JPEG and WebP: what other programs, and ours, read from them."""

import io
import json
import os
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from sd_parsers import ParserManager

from sampler.cli import main
from sampler.core.errors import UsageError
from sampler.runs.encodings import MAX_SEGMENT, Encoding, _note_alpha, decode, encoding_of
from sampler.runs.jobs import Job, JobSettings, Model
from sampler.runs.media import decode_webp
from sampler.runs.metadata import parameters, read_record

FORMATS = ("png", "jpeg", "webp")
PROMPTS = [
    "a fox",
    'a "quoted" fox, with: marks; 日本 ü {a}',
    "two: Steps, of a stair (a fox:1.2)",
]


def run(capsys, *arguments):
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("format", FORMATS)
def test_another_program_reads_every_field(capsys, format):
    line = [
        "generate",
        *PROMPTS,
        "--negative-prompt",
        "a cat, a dog: no",
        "--seed",
        7,
        "--steps",
        2,
    ]
    line += ["--scale", 2.5, "--sampler", "ab", "--set", f"output.format={format}", "-o", "out"]
    code, out, err = run(capsys, *line)
    assert code == 0, err
    paths = sorted(out.splitlines())
    for path, prompt in zip(paths, PROMPTS, strict=True):
        found = ParserManager().parse(path)
        (sampler,) = found.samplers
        assert [str(p.value) for p in sampler.prompts] == [prompt]
        assert [str(p.value) for p in sampler.negative_prompts] == ["a cat, a dog: no"]
        assert sampler.name == "ab"
        assert sampler.parameters == {"cfg_scale": "2.5", "seed": "7", "steps": "2"}
        assert sampler.model.name == "bundled" and len(sampler.model.hash) == 10
        assert found.metadata["Size"] == "64x64" and found.metadata["Guidance"] == "cfg"
        record = read_record(open(path, "rb").read())["record"]
        assert (record["prompt"], record["seed"], record["steps"]) == (prompt, 7, 2)


def test_a_label_with_separators_is_quoted():
    """As web UIs do; unquoted, a reader would take its second half for the next setting."""
    spec = {"name": "cfg", "scale": 3.0}
    settings = JobSettings(2, 64, 64, {"name": "ddim"}, spec)
    job = Job(0, "0" * 20, 0, 0, "a fox", "", 1)
    line = parameters(job, settings, Model("files:0", label="a, b: c"), (64, 64)).splitlines()[-1]
    assert 'Model: "a, b: c", ' in line
    plain = parameters(job, settings, Model("files:0", label="a-b"), (64, 64))
    assert "Model: a-b, " in plain


@pytest.mark.parametrize("format", FORMATS[1:])
def test_a_run_of_lossy_images_is_a_run(capsys, tmp_path, format):
    """Resumed, verified, shown, replayed, exported and drawn like one of PNGs."""
    suffix = Encoding(format).suffix
    sets = ["--set", f"output.format={format}", "--set", "output.quality=80"]
    line = ["generate", "a fox", "a dog", "--seed", 1, "--steps", 2, *sets, "-o", "run"]
    assert run(capsys, *line)[0] == 0
    first, second = sorted((tmp_path / "run/images").iterdir())
    assert first.suffix == suffix
    with Image.open(first) as image:
        assert image.format == format.upper() and image.size == (64, 64)
    data = first.read_bytes()
    first.unlink()
    assert run(capsys, "resume", "run")[0] == 0
    assert first.read_bytes() == data, "equal jobs are equal bytes"
    assert run(capsys, "verify", "run")[0] == 0
    assert json.loads(run(capsys, "show", first)[1])["record"]["prompt"] == "a fox"
    code, out, err = run(capsys, "replay", "run#0")
    assert code == 0 and out.strip().endswith(suffix) and "no pixel differs" in err
    assert open(out.strip(), "rb").read() == data
    assert run(capsys, "replay", first, "-o", "again.png")[0] == 0
    with Image.open("again.png") as image:
        assert image.format == "PNG"
    assert run(capsys, "grid", "run")[0] == 0
    assert run(capsys, "gallery", "run")[0] == 0 and suffix in open("run/gallery.html").read()
    assert run(capsys, "export", "run", "--to", "webdataset", "-o", "shards")[0] == 0
    import tarfile

    with tarfile.open("shards/000000.tar") as shard:
        assert shard.getnames()[0] == f"000000{suffix}"
    os.rename(second, f"{second}x{suffix}")
    code, out, _ = run(capsys, "verify", "run")
    assert code == 3 and "no record in the journal" in out and "the file is missing" in out


def test_a_higher_quality_is_nearer():
    x = np.linspace(0, 255, 64)
    noise = np.random.default_rng(0).normal(0, 20, (64, 64))
    grey = (np.add.outer(x, x[::-1]) / 2 + noise).clip(0, 255).astype(np.uint8)
    pixels = np.stack([grey] * 3, 2)
    for format in FORMATS[1:]:
        low, high = (
            np.abs(decode(Encoding(format, q).encode(pixels, {}))[0].astype(int) - pixels).mean()
            for q in (20, 95)
        )
        assert high < low / 2 and high < 5, format
    assert (decode(Encoding("png").encode(pixels, {}))[0] == pixels).all()


ALPHA = np.random.default_rng(0).integers(0, 256, (3, 16, 24, 4), np.uint8)


@pytest.mark.parametrize("isal", [True, False])
def test_alpha_is_kept(monkeypatch, isal):
    if not isal:
        monkeypatch.setitem(sys.modules, "isal", None)
    for pixels in ALPHA[0], np.ones((8, 8, 4), np.uint8):
        with Image.open(io.BytesIO(Encoding("png").encode(pixels, {}))) as image:
            assert image.mode == "RGBA" and (np.asarray(image) == pixels).all()


def test_layers_are_frames_with_alpha():
    frames = decode_webp(Encoding("png").encode(ALPHA, {}))
    found = np.stack([np.asarray(frame) for frame in frames])
    seen = ALPHA[..., 3:] > 0
    assert (found[..., 3] == ALPHA[..., 3]).all() and (found * seen == ALPHA * seen).all()


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_a_format_without_alpha_is_told(caplog, format):
    _note_alpha.cache_clear()
    clear = np.full((16, 16, 4), (200, 0, 0, 51), np.uint8)
    with caplog.at_level("WARNING", logger="sampler"):
        data = [Encoding(format).encode(clear, {}) for _ in range(2)][0]
    warned = [record.getMessage() for record in caplog.records]
    with Image.open(io.BytesIO(data)) as image:
        found = image.convert("RGBA").getpixel((8, 8))
    if format == "jpeg":
        assert len(warned) == 1 and "no alpha" in warned[0]
        assert np.abs(np.subtract(found, (244, 204, 204, 255))).max() <= 3
    else:
        assert not warned and found[3] == 51


@pytest.mark.parametrize("format", FORMATS)
def test_texts_come_back_as_they_were(format):
    texts = {"sampler": '{"a": "<b> & \\"c\\" ü 日本"}', "parameters": "x <y> & 🦊\nSteps: 1"}
    data = Encoding(format).encode(np.zeros((8, 8, 3), np.uint8), texts)
    assert decode(data)[1] == texts
    assert decode(Encoding(format).encode(np.zeros((8, 8, 3), np.uint8), {}))[1] == {}


def test_texts_that_no_segment_holds_are_left_out():
    texts = {"sampler": "{}" + " " * MAX_SEGMENT, "parameters": "short"}
    data = Encoding("jpeg").encode(np.zeros((8, 8, 3), np.uint8), texts)
    assert decode(data)[1] == {"parameters": "short"}


def test_wrong_formats_are_one_sentence(capsys):
    assert encoding_of("a/b.JPEG") == replace(Encoding(), format="jpeg")
    with pytest.raises(UsageError, match="x.gif: images are written as .png, .jpg, .webp"):
        encoding_of("x.gif")
    for sets, words in (
        (["output.format=gif"], "must be one of 'png', 'jpeg', 'webp'"),
        (["output.format=jpeg", "output.quality=0"], "must be an integer from 1 to 100"),
        (["output.quality=90"], "PNG is lossless"),
    ):
        arguments = [part for value in sets for part in ("--set", value)]
        code, _, err = run(capsys, "generate", "a fox", *arguments, "-o", "out")
        assert code == 2 and words in err and not os.path.exists("out"), err
