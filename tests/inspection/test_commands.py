"""`sampler inspect`: what each command prints and writes."""

import csv
import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import sampler
from sampler.cli import main
from sampler.core import images
from sampler.models.proximal import ProximalConfig, ProximalNetwork
from sampler.models.proximal_files import load_proximal, save_proximal

PROMPTS = ("a red apple on a blue background", "a dog on a green background")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder of 24 images with labels.csv beside it."""
    home = tmp_path_factory.mktemp("inspect")
    line = ["generate", *PROMPTS, "-n", "12", "--seed", "0", "--steps", "2", "-q"]
    assert main([*line, "-o", str(home / "run")]) == 0
    names = sorted(path.name for path in (home / "run" / "images").iterdir())
    lines = [f"images/{name},{'apple' if int(name[:6]) < 12 else 'dog'}" for name in names]
    (home / "labels.csv").write_text("\n".join(["file,concept", *lines]) + "\n")
    return home


def inspected(capsys, subject, home, *options):
    """(rows of the table, files, JSON) of a command."""
    out = home / subject
    capsys.readouterr()
    assert main(["inspect", subject, *map(str, options), "-o", str(out)]) == 0
    assert capsys.readouterr().out.rstrip().endswith(str(out))
    with (out / f"{subject}.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    found = json.loads((out / f"{subject}.json").read_text())
    assert len(found["rows"]) == len(rows)
    return rows, sorted(path.name for path in out.iterdir()), found


def test_features(capsys, run):
    labels = run / "labels.csv"
    options = ("--images", run / "run", "--labels", labels, "--t", 0.15, "--block", "up.0")
    rows, _, _ = inspected(capsys, "features", run, *options)
    by_name = {row["features"]: row for row in rows}
    assert set(by_name) == {"up.0", "pooled latents", "raw latents", "chance"}
    assert float(by_name["chance"]["accuracy"]) == 0.5
    assert float(by_name["up.0"]["accuracy"]) == 1 and by_name["up.0"]["tested"] == "6"


def test_attention(capsys, run):
    options = (PROMPTS[0], "--word", "apple", "--word", "blue", "--steps", 2, "-n", 2)
    rows, files, _ = inspected(capsys, "attention", run, *options)
    assert [(row["image"], row["word"]) for row in rows[:2]] == [("0", "apple"), ("0", "blue")]
    assert files == ["000000.png", "000001.png", "attention.csv", "attention.json",
                     "maps.safetensors"]  # fmt: skip
    maps = load_file(run / "attention" / "maps.safetensors")
    assert maps["000001/apple"].shape == (16, 16)
    with Image.open(run / "attention" / "000000.png") as sheet:
        assert sheet.width > 3 * 128 and len(sheet.getcolors(10**6) or ()) > 1000


def test_basis(capsys, run):
    options = ("--images", run / "run", "--t", 0.25, "--signs", 4)
    rows, files, _ = inspected(capsys, "basis", run, *options)
    assert files == ["000_spectrum.png", "000_t249.png", "basis.csv", "basis.json"]
    assert 0.2 < float(rows[0]["asymmetry"]) < 0.8  # of a trained network
    assert 40 < float(rows[0]["trace"]) < 300


def test_memory(capsys, run):
    options = ("--samples", run / "run", "--training", run / "run", "--features", "spectrum")
    rows, files, _ = inspected(capsys, "memory", run, *options)
    assert all(row["sample"] == row["nearest"] and float(row["first"]) == 0 for row in rows)
    assert files == ["memory.csv", "memory.json", "memory.png"] and len(rows) == 24
    twin = ("--other", "bundled-flow", "--steps", 1, "--limit", 2)
    rows, _, found = inspected(capsys, "memory", run, *options, *twin)
    assert len(rows) == 2 and -1 <= float(rows[0]["agreement"]) <= 1
    assert found["agreement"] == pytest.approx(
        sum(float(row["agreement"]) for row in rows) / 2, abs=1e-3
    )


def test_realism(capsys, run):
    options = ("--real", run / "run", "--generated", run / "run")
    rows, files, _ = inspected(capsys, "realism", run, *options)
    pairs = [row["real against"] for row in rows]
    assert pairs == ["generated", "real", "real through the VAE"] * 2
    assert {row["features"] for row in rows} == {"classifier", "spectrum"}
    assert "realism_classifier.png" in files and "realism_spectrum.png" not in files


def test_loss(capsys, run):
    options = ("--images", run / "run", "--t", 0.15, "--t", 0.6)
    rows, files, found = inspected(capsys, "loss", run, *options)
    assert [row["timestep"] for row in rows] == ["149", "599"] and found["prompts"] is True
    assert float(rows[0]["error"]) < float(rows[1]["error"])
    assert "loss.png" in files


def test_prior(capsys, run):
    """The values are the network's own, of the encoded images; another shape is refused."""
    torch.manual_seed(0)
    network = ProximalNetwork(ProximalConfig((4, 16, 16), hidden=4, layers=2, alpha=0.2))
    folder = save_proximal(network, run / "lpn")
    options = (folder, "--images", run / "run", "--limit", 2)
    rows, files, found = inspected(capsys, "prior", run, *options)
    assert files == ["prior.csv", "prior.json"] and found["network"] == str(folder)
    adapter = sampler.load().pipeline
    latents = adapter.latents_of(images.read(str(run / "run" / rows[0]["image"])))
    wanted = load_proximal(folder).prior(latents)
    assert float(rows[0]["prior"]) == pytest.approx(float(wanted.value), rel=1e-3)
    assert len(rows) == 2 and float(rows[0]["gap"]) == pytest.approx(float(wanted.gap), abs=1e-3)
    other = save_proximal(ProximalNetwork(ProximalConfig((4, 8, 8), hidden=4, layers=2)), run / "o")
    assert main(["inspect", "prior", str(other), "--images", str(run / "run")]) == 2
    assert "takes rows of (4, 8, 8)" in capsys.readouterr().err


def test_events_and_notes(capsys, run, tmp_path):
    line = ["inspect", "loss", "--images", str(run / "run"), "--t", "0.3", "--limit", "4", "--json"]
    assert main([*line, "-o", str(tmp_path / "loss")]) == 0
    captured = capsys.readouterr()
    first, last = map(json.loads, captured.out.splitlines())
    assert first["t"] == "loss" and first["timestep"] == 299 and last["t"] == "summary"
    assert "4 of 24 images are read; --limit reads more." in captured.err


def test_images_of_another_size_are_fitted_and_told(capsys, tmp_path):
    for k in range(2):
        Image.new("RGB", (80, 100), (90 * k, 40, 60)).save(tmp_path / f"{k}.png")
    line = ["inspect", "loss", "--images", str(tmp_path), "--t", "0.3", "-o", str(tmp_path / "o")]
    assert main(line) == 0
    err = capsys.readouterr().err
    assert "2 images cropped and scaled to 64x64." in err
    assert "2 images have no prompt: the network is evaluated without one." in err
    found = json.loads((tmp_path / "o" / "loss.json").read_text())
    assert found["rows"][0]["gap"] is None
