"""`sampler.evaluate` on run folders and on folders of other images."""

import functools
import json
import math
import os
import random
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import sampler
from sampler import registry
from sampler.bundled import FOLDER, classifier, judge, prompts
from sampler.core.errors import SamplerError, UsageError
from sampler.core.images import read_mask
from sampler.core.inputs import opened, planned
from sampler.evaluation import features, scoring
from sampler.evaluation.intervals import interval
from sampler.evaluation.lines import evaluation_lines, seed_of
from sampler.evaluation.parse import scorers_from
from sampler.evaluation.score_files import image_key
from sampler.evaluation.scorers import clipped, saturation, sharpness
from sampler.runs.encodings import decode
from sampler.runs.readers import RawLine

TEXTS = [p.text for p in prompts(8, start=20)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run folders of two settings with shared seeds: 8 prompts, 2 images each."""
    engine, root = sampler.load(dtype="float32"), tmp_path_factory.mktemp("runs")
    seeds = [seed_of(text, k) for text in TEXTS for k in range(2)]
    for name, scale in (("three", 3), ("four", 4)):
        guidance = {"name": "cfg", "scale": scale}
        engine.generate(
            TEXTS, n=2, seeds=seeds, steps=2, guidance=guidance, out=root / name, batch_size=16
        )
    return root


@pytest.fixture
def run(runs, tmp_path):
    return shutil.copytree(runs / "three", tmp_path / "run")


@pytest.fixture
def folder(tmp_path):
    """A folder of images of unknown origin, of two sizes."""
    draw = np.random.default_rng(0)
    for k in range(5):
        side = 24 if k % 2 else 32
        pixels = draw.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{k}.png")
    (tmp_path / "notes.md").write_text("no image")
    return tmp_path


def content(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name != ".lock"}


def test_the_same_evaluation_writes_the_same_bytes_and_scores_nothing_again(run, monkeypatch):
    sampler.evaluate(run, ["judge", "brightness"])
    before = content(run)
    assert {"eval.md", "eval.json", "eval.csv"} < set(before)
    page, facts = (run / "eval.md").read_text(), json.loads((run / "eval.json").read_text())
    assert f"| fingerprint | {facts['fingerprint']} |" in page
    for key in ("sampler", "guidance", "steps", "dtype", "device", "versions", "nfe per image"):
        assert f"\n| {key} | " in page
    for label, fingerprint in facts["scorers"].items():
        assert f"| scorer {label} | {fingerprint} |" in page
    monkeypatch.setattr(scoring, "_chunk", None)
    sampler.evaluate(run, ["judge", "brightness"])
    assert content(run) == before


def test_scores_of_a_stopped_evaluation_are_those_of_one_that_was_not(run, monkeypatch):
    monkeypatch.setattr(scoring, "CHUNK", 4)
    sampler.evaluate(run, "judge")
    whole = content(run)
    (path,) = run.glob("scores-judge-*.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    for cut in (0, 2, 7):
        path.write_bytes(b"".join(lines[:cut]) + lines[cut][: len(lines[cut]) // 2])
        sampler.evaluate(run, "judge")
        again = content(run)
        assert {k: v for k, v in again.items() if k != path.name} == {
            k: v for k, v in whole.items() if k != path.name
        }


def test_an_evaluation_that_is_killed_at_twenty_points_gives_the_same_bytes(run, monkeypatch):
    """Before any durable call; a score file may keep a torn line, the tables are whole."""
    monkeypatch.setattr(scoring, "CHUNK", 4)
    total = []
    with monkeypatch.context() as patched:
        _before_durable(patched, lambda: total.append(1))
        sampler.evaluate(run, "brightness")
    whole = {k: v for k, v in content(run).items() if k.startswith("eval.")}
    draw, killed = random.Random(0), 0
    for _ in range(20):
        for path in (*run.glob("scores-*"), *run.glob("eval.*")):
            path.unlink()
        killed += _killed_after(run, draw.randrange(len(total)))
        sampler.evaluate(run, "brightness")
        assert {k: v for k, v in content(run).items() if k.startswith("eval.")} == whole
    assert killed == 20


def _before_durable(patched, action):
    """Call a function before each system call that makes something durable."""
    for name in ("open", "write", "fsync", "replace"):
        call = getattr(os, name)
        wrapped = functools.partial(lambda call, *a, **k: (action(), call(*a, **k))[1], call)
        patched.setattr(os, name, wrapped)


def _killed_after(run, count):
    """Evaluate in a forked process that kills itself before its durable call number `count`."""
    child = os.fork()
    if child == 0:
        left = [count]

        def die():
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            with pytest.MonkeyPatch.context() as patched:
                _before_durable(patched, die)
                sampler.evaluate(run, "brightness")
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def test_a_further_scorer_leaves_images_and_scores_alone(run):
    sampler.evaluate(run, "brightness")
    before = {
        p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file() and "eval" not in p.name
    }
    found = sampler.evaluate(run, "brightness,judge")
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert [r.scorer for r in found.rows][:4] == [
        "brightness", "judge", "judge.concept", "judge.background"
    ]  # fmt: skip


def test_rows_are_means_over_prompts_of_what_the_scorer_says(run):
    found = sampler.evaluate(run, "classifier")
    pictures = found.scored.source.pictures
    images = torch.cat([sampler.core.images.read(p.read()) for p in pictures])
    wanted = sampler.build("reward", "classifier")(images, [p.prompt for p in pictures])
    assert found.scored.images["classifier"] == pytest.approx(wanted.tolist(), rel=1e-5)
    by_prompt = wanted.double().view(8, 2).mean(1).numpy()
    row = found["classifier"]
    assert row.mean == pytest.approx(by_prompt.mean(), rel=1e-5)
    assert row.interval == pytest.approx(interval(by_prompt), rel=1e-5)
    assert (row.prompts, row.images) == (8, 16)
    header = found.plain()
    assert header["nfe_per_image"] == 4 and header["steps"] == 2 and header["dtype"] == ["float32"]
    assert header["fingerprint"].startswith("tensors:") and "judge" not in header["scorers"]


def test_a_regenerated_image_is_scored_again(run):
    first = sampler.evaluate(run, "brightness").scored.images["brightness"]
    lines = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    path = run / lines[0]["file"]
    Image.new("RGB", (64, 64), "white").save(path)
    import hashlib

    lines[0] |= {"bytes": path.stat().st_size,
                 "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}  # fmt: skip
    (run / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    second = sampler.evaluate(run, "brightness").scored.images["brightness"]
    assert sum(a != b for a, b in zip(first, second, strict=True)) == 1 and max(second) == 1


def test_a_function_is_called_again_since_its_source_does_not_tell_its_values(tmp_path):
    """A partial, a closure, an object with values, and each of them inside a composite reward."""

    def level(images, prompts, value):
        return images.new_full((len(images),), value)

    def closure(value):
        def scorer(images, prompts):
            return level(images, prompts, value)

        return scorer

    class Level:
        def __init__(self, value):
            self.value = value

        def __call__(self, images, prompts):
            return level(images, prompts, self.value)

    place = made(tmp_path / "images", [("a", 0)])
    for build in (lambda v: functools.partial(level, value=v), closure, Level):
        for wrap in (
            lambda f: f,
            lambda f: {"name": "sum", "rewards": [{"name": "target", "reward": f, "value": 9}]},
        ):
            found = [
                sampler.evaluate(place, wrap(build(v)), out=tmp_path / "out").rows[0].mean
                for v in (1.0, 2.0)
            ]
            assert found[0] != found[1]
    assert {p.name.split("-")[1] for p in (tmp_path / "out").glob("scores-*")} == {
        "saturation", "clipped", "sharpness"
    }  # fmt: skip


def test_a_scorer_with_other_weights_has_a_file_of_its_own(run, monkeypatch):
    sampler.evaluate(run, "judge")
    other = judge.load()
    other.heads["concept"].weight.add_(1e-3)
    monkeypatch.setattr("sampler.evaluation.scorers.load", lambda: other)
    sampler.evaluate(run, "judge")
    assert len([*run.glob("scores-judge-*.jsonl")]) == 2


def test_paired_intervals_are_at_least_twice_as_narrow(runs):
    found = sampler.evaluate(runs / "three", "judge", against=runs / "four")
    other = sampler.evaluate(runs / "four", "judge")
    row = found["saturation"]
    width = row.difference.interval[1] - row.difference.interval[0]
    sides = [r.interval[1] - r.interval[0] for r in (row, other["saturation"])]
    assert 2 * width < np.hypot(*sides)
    assert row.mean - row.other == pytest.approx(row.difference.mean)
    assert row.difference.wins + row.difference.ties + row.difference.losses == 8
    assert found["drift"].mean > 0 and found["drift"].other is None
    assert found["vendi(bundled classifier)"].difference is not None
    assert "| shown |" in found.markdown()


def test_a_comparison_is_cut_to_what_both_have_and_says_so(runs, tmp_path):
    part = tmp_path / "part"
    part.mkdir()
    source = sampler.evaluate(runs / "four").scored.source
    rows = []
    for k, picture in enumerate(source.pictures[:6]):
        (part / f"{k}.png").write_bytes(picture.read())
        rows.append({"file_name": f"{k}.png", "text": picture.prompt, "seed": picture.seed})
    (part / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = sampler.evaluate(runs / "four", "judge", against=part, out=tmp_path / "out")
    assert found["judge"].images == 6 and found["judge"].difference.mean == 0
    assert found["judge"].difference.ties == 3 and found["drift"].mean == 0
    assert any(f"10 of 16 images of {runs / 'four'} have no" in note for note in found.notes)
    assert not [*part.glob("scores-*")]  # a folder that is not ours
    for row in rows:
        row["seed"] += 1
    (part / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = sampler.evaluate(runs / "four", "judge", against=part, out=tmp_path / "out")
    assert any("no seed is shared" in note for note in found.notes)


def made(place, keys, side=24, seed=0):
    """A folder of noise with metadata.jsonl; keys: (prompt, seed), without a seed where None."""
    place.mkdir()
    draw, rows = np.random.default_rng(seed), []
    for k, (prompt, own) in enumerate(keys):
        pixels = draw.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{k}.png")
        rows.append({"file_name": f"{k}.png", "prompt": prompt, "seed": own})
    lines = (json.dumps({k: v for k, v in row.items() if v is not None}) for row in rows)
    (place / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return place


def test_images_without_seeds_are_paired_by_their_names(tmp_path):
    first = made(tmp_path / "first", [(text, None) for text in "ab" for _ in range(3)])
    found = sampler.evaluate(first, against=shutil.copytree(first, tmp_path / "copy"))
    assert (found["drift"].mean, found["drift"].images) == (0, 6)
    renamed = made(tmp_path / "renamed", [("c", None)] * 6 + [("a", None)] * 2)
    found = sampler.evaluate(first, against=renamed)
    assert any("no seed is shared" in note for note in found.notes)
    with pytest.raises(KeyError):
        found["drift"]


def test_measures_of_sets_compare_equal_numbers_of_the_same_images(tmp_path):
    """An effective number, and the distances of sets, depend on how many images there are."""
    few = made(tmp_path / "few", [(text, k) for text in "ab" for k in range(2)])
    many = made(tmp_path / "many", [(text, k) for text in "abc" for k in range(3)])
    same = made(tmp_path / "same", [(text, k) for text in "ab" for k in range(2)], seed=1)
    for text in "ab":
        for k in range(2):
            row = "ab".index(text) * 2 + k
            shutil.copy(same / f"{row}.png", many / f"{'abc'.index(text) * 3 + k}.png")
    scorers = ["frechet"]
    wanted = sampler.evaluate(few, scorers, against=same)
    for first, second, names in ((few, many, ("mean", "other")), (many, few, ("other", "mean"))):
        found = sampler.evaluate(first, scorers, against=second)
        for label in (f"{n}(bundled classifier)" for n in ("vendi", "diversity", "frechet")):
            row = found[label]
            for ours, name in zip(names, ("mean", "other"), strict=True):
                assert getattr(row, ours) == pytest.approx(getattr(wanted[label], name), rel=1e-6)
            assert (row.images, row.prompts) == (4, 2)
        assert [note for note in found.notes if "no partner" in note] == [
            f"5 of 9 images of {many} have no partner in {few}"
        ]
    unseeded = made(tmp_path / "unseeded", [(text, 10 + k) for text in "ab" for k in range(3)])
    found = sampler.evaluate(few, scorers, against=unseeded)
    assert found["vendi(bundled classifier)"].images == found["frechet(bundled classifier)"].images


def test_pairs_of_other_sizes_have_no_drift_and_the_notes_say_so(tmp_path):
    keys = [("a", 0), ("a", 1)]
    first, larger = made(tmp_path / "first", keys), made(tmp_path / "larger", keys, side=32)
    found = sampler.evaluate(first, against=larger)
    assert "2 of 2 pairs of images have no drift, since their sizes differ" in found.notes


def test_images_of_unknown_origin_are_scored_without_prompts(folder):
    before = sorted(folder.iterdir())
    found = sampler.evaluate(folder, "brightness")
    assert (found["brightness"].images, found["brightness"].prompts) == (5, 5)
    assert any("the prompt of 5 of 5 images is not known" in note for note in found.notes)
    assert sorted(folder.iterdir()) == before
    pixels = np.asarray(Image.open(folder / "3.png"), dtype=np.float64) / 255
    names = [p.name for p in found.scored.source.pictures]
    assert found.scored.images["brightness"][names.index("3.png")] == pytest.approx(pixels.mean())


def test_a_scorer_that_reads_prompts_refuses_images_without_one(folder):
    with pytest.raises(UsageError, match=r"'judge' reads prompts, and 0.png has none"):
        sampler.evaluate(folder, "judge")
    (folder / "0.txt").write_text("a fox on a red background")
    with pytest.raises(UsageError, match="1.png has none"):
        sampler.evaluate(folder, {"name": "sum", "rewards": ["brightness", "classifier"]})
    sampler.evaluate(folder, {"name": "classifier", "label": "fox"})


@pytest.mark.parametrize("transparent", ["alpha", "palette"])
def test_transparent_images_are_scored_on_white(transparent, tmp_path):
    """Not by the colours that lie below the alpha, green in one half here."""
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[:16] = (255, 0, 0, 255)
    pixels[16:] = (0, 255, 0, 0)
    image = Image.fromarray(pixels)
    if transparent == "palette":
        image = Image.fromarray((pixels[:, :, 1] // 255).astype(np.uint8), "P")
        image.putpalette([255, 0, 0, 0, 255, 0])
        image.info["transparency"] = 1
    image.save(tmp_path / "a.png")
    Image.new("RGBA", (32, 32), "red").save(tmp_path / "opaque.png")
    found = sampler.evaluate(tmp_path, "brightness")
    assert found.scored.images["brightness"] == pytest.approx([2 / 3, 1 / 3])
    assert "1 of 2 images have alpha: they are scored on white" in found.notes


def test_grey_values_of_sixteen_bits_are_not_clipped(tmp_path):
    values = np.linspace(0, 65535, 1024).astype(np.uint16).reshape(32, 32)
    Image.fromarray(values).save(tmp_path / "a.png")
    row = sampler.evaluate(tmp_path, "brightness")["brightness"]
    assert row.mean == pytest.approx(0.5, abs=1e-3)
    assert read_mask(tmp_path / "a.png").mean() == pytest.approx(0.5, abs=1e-3)
    given = opened("image", planned("image", str(tmp_path / "a.png")))
    assert np.asarray(given)[..., 0] == pytest.approx(values / 257, abs=0.5)
    assert decode((tmp_path / "a.png").read_bytes())[0].mean() == pytest.approx(127.5, abs=0.2)


def test_files_that_are_left_out_and_images_that_move_are_noted(folder, tmp_path_factory):
    first, second = (Image.new("RGB", (16, 16), name) for name in ("white", "black"))
    for name in ("moving.webp", "moving.png"):
        first.save(folder / name, save_all=True, append_images=[second])
    first.save(folder / "a.gif")
    first.save(folder / "b.tif")
    (folder / "dangling.png").symlink_to(folder / "nowhere.png")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (folder / "elsewhere").symlink_to(elsewhere)
    found = sampler.evaluate(folder)
    assert "2 of 7 images move: their first frames are scored" in found.notes
    assert (
        f"4 left out of {folder}: a.gif, b.tif, dangling.png, ...; PNG, JPEG and WebP files are "
        "read, and links to folders are not followed"
    ) in found.notes


@pytest.mark.parametrize(
    ("name", "rows", "words"),
    [
        (
            "metadata.jsonl",
            '{"file_name": "0.png", "prompt": "a"}\n' * 2,
            "'0.png' has a row already",
        ),
        ("metadata.csv", "file_name,prompt,seed\n0.png,a,-1\n", "seed must be an integer of at"),
        ("metadata.jsonl", '{"file_name": "0.png", "prompt": "a", "seed": true}\n', "not True"),
        ("metadata.jsonl", '{"file_name": "0.png", "prompt": "a", "seed": "x"}\n', "not 'x'"),
        (
            "metadata.csv",
            "file_name,prompt\n9.png,a\n",
            "metadata.csv:2: there is no image '9.png'",
        ),
        ("0.txt", "a fox".encode("utf-16"), "0.txt: not UTF-8 text"),
        ("0.png", b"\x89PNG", r"0\.png: it is not a readable image"),
    ],
)
def test_what_lies_beside_images_is_refused_where_it_does_not_fit(folder, name, rows, words):
    (folder / name).write_bytes(rows if isinstance(rows, bytes) else rows.encode())
    with pytest.raises(UsageError, match=words):
        sampler.evaluate(folder)


def test_tables_of_any_kind_and_depth_tell_prompts_seeds_and_metadata(folder):
    def wanted(images, prompts, metadata):
        return [float(own.get("value", -1)) for own in metadata]

    wanted.reads_prompt = False
    inner = folder / "inner"
    inner.mkdir()
    for name in ("3.png", "4.png"):
        (folder / name).rename(inner / name)
    (folder / "metadata.csv").write_bytes(
        "\ufefffile_name,prompt,seed,meta_value\n./0.png,a,1,2.5\n1.png,b,2.0,3\n".encode()
    )
    (inner / "metadata.jsonl").write_text(
        '{"file_name": "3.png", "text": "c", "seed": "7", "width": 24, "license": "x"}\n'
    )
    (folder / "2.txt").write_bytes(b"\xef\xbb\xbfd\n")
    found = sampler.evaluate(folder, wanted)
    pictures = found.scored.source.pictures
    told = {p.name: (p.prompt, p.seed) for p in pictures}
    assert told == {
        "0.png": ("a", 1), "1.png": ("b", 2), "2.png": ("d", None), "inner/3.png": ("c", 7),
        "inner/4.png": (None, None),
    }  # fmt: skip
    scores = dict(zip([p.name for p in pictures], found.scored.images["wanted"], strict=True))
    assert (scores["0.png"], scores["1.png"], scores["2.png"]) == (2.5, 3, -1)
    assert any(
        f"{inner / 'metadata.jsonl'} that are not read: width, license" in n for n in found.notes
    )


def test_a_folder_of_runs_is_one_set_and_the_notes_say_so(runs):
    found = sampler.evaluate(runs, "brightness")
    assert found["brightness"].images == 32
    assert f"{runs} holds 2 run folders, scored as one set: four, three" in found.notes


def test_metadata_is_part_of_what_a_score_is_of():
    assert image_key("d", "p", {}) == image_key("d", "p", {})
    assert len({image_key("d", "p", m) for m in ({}, {"meta_a": 1}, {"meta_a": 2})}) == 3


def test_images_of_a_run_that_have_changed_are_not_scored(run):
    first = sorted((run / "images").iterdir())[0]
    Image.new("RGB", (64, 64), "white").save(first)
    found = sampler.evaluate(run, "brightness")
    assert found["brightness"].images == 15
    assert f"1 of 16 images of {run} are missing, changed or failed" in found.notes


def test_scores_and_measures_that_are_lacking_are_noted(tmp_path):
    place = made(tmp_path / "tiny", [("a", 0), ("b", 0)], side=2)
    found = sampler.evaluate(place, ["fd_inf", "vendi"])
    assert found["fd_inf(bundled classifier)"].mean is None
    assert set(found.notes) == {
        f"no image of {place} has a score of sharpness",
        f"vendi(bundled classifier) needs several images of a prompt; {place} has none",
        "fd_inf(bundled classifier) needs at least 16 images",
        "distances of sets are biased below 10,000 images: compare them at equal numbers, here 2",
        "intervals over fewer than 20 prompts are too narrow, here 2",
    }
    shutil.copy(made(tmp_path / "large", [("a", 0)]) / "0.png", place / "0.png")
    assert f"1 of 2 images of {place} have no score of sharpness" in sampler.evaluate(place).notes


def test_one_prompt_has_no_interval_that_could_be_too_narrow(tmp_path):
    place = made(tmp_path / "one", [("a", 0), ("a", 1)])
    found = sampler.evaluate(place)
    assert found["saturation"].interval is None and found.notes == []


def test_errors_of_scorers_name_the_files(tmp_path):
    def broken(images, prompts):
        return [math.nan if prompt == "c" else 0.0 for prompt in prompts]

    place = made(tmp_path / "images", [("a", 0), ("c", 0)])
    with pytest.raises(SamplerError, match=r"1\.png: The reward 'broken' is not finite"):
        sampler.evaluate(place, broken)
    with pytest.raises(UsageError, match=r"0\.png to 1\.png: The prompt 'a' names no class"):
        sampler.evaluate(place, "classifier")
    shutil.copy(made(tmp_path / "small", [("a", 0)], side=8) / "0.png", place / "1.png")
    with pytest.raises(UsageError, match=r"^1\.png: A reward takes images .* of at least 16"):
        sampler.evaluate(place, "brightness")


def test_a_reference_of_other_features_is_refused(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("statistics") / "other.safetensors"
    save_file({"mean": torch.zeros(3), "covariance": torch.eye(3)}, path)
    with pytest.raises(UsageError, match="has 3 features, and those of the bundled classifier are"):
        sampler.evaluate(folder, f"frechet:reference={path}")


def test_prompts_of_images_are_read_from_what_lies_beside_or_inside(runs, folder):
    inside = sampler.evaluate(runs / "three").scored.source.pictures[0]
    (folder / "own.png").write_bytes(inside.read())
    (folder / "0.txt").write_text("a cat\n")
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_text("parameters", "a dog\nNegative prompt: blur\nSteps: 20, Seed: 12, CFG scale: 3")
    Image.new("RGB", (16, 16)).save(folder / "ui.png", pnginfo=text)
    found = {p.name: (p.prompt, p.seed) for p in sampler.evaluate(folder).scored.source.pictures}
    assert found["own.png"] == (inside.prompt, inside.seed)
    assert found["0.png"] == ("a cat", None) and found["ui.png"] == ("a dog", 12)
    assert found["1.png"] == (None, None)


@pytest.mark.parametrize(
    ("scorers", "words"),
    [
        ("fid", "is the name of a protocol"),
        ("GenEval", "is the name of a protocol"),
        ("dpg-bench", "is the name of a protocol"),
        ("gen_eval", "is the name of a protocol"),
        ("fid50k", "is the name of a protocol"),
        ("FID-score", "is the name of a protocol"),
        ("t2i-compbench", "is the name of a protocol"),
        ("frechet:reference=", "'reference=' must be OPTION=VALUE"),
        ("brigthness", "did you mean 'brightness'"),
        ("judge:head=style", "has no options"),
        ("classifier:haed=style", "haed"),
        ("brightness,brightness", "given twice"),
        ("frechet:features=nowhere", "needs reference=FOLDER"),
        ("kernel", "needs reference=FOLDER"),
        ("vendi:reference=x", "needs none"),
        ("classifier:head", "must be OPTION=VALUE"),
        ("module:function", "allow-python"),
        ("votes", "judges whole batches"),
        ("kernel:reference=nowhere", "reference=nowhere does not exist"),
        ("frechet:reference=tests", "must be a folder of at least 2 images"),
        ("kernel:reference=README.md", "needs a folder of images, and reference=README.md"),
        ("frechet:reference=README.md", "safetensors file with mean and covariance"),
    ],
)
def test_a_wrong_scorer_is_refused_in_a_sentence(scorers, words):
    with pytest.raises((SamplerError, ValueError), match=words) as caught:
        scorers_from([scorers])
    assert str(caught.value).count("\n") == 0


def test_a_function_of_ones_own_gets_no_protocols_name():
    def mean(images, prompts):
        return images.mean((1, 2, 3))

    assert scorers_from([mean])[0].label == "mean"
    for name in ("fid", "GenEval", "clip-score", "gen_eval", "FID_50k"):
        mean.__name__ = name
        with pytest.raises(UsageError, match=f"'{name}' is the name of a protocol"):
            scorers_from([mean])


def test_a_label_names_the_folder_however_it_is_written():
    labels = [scorers_from([f"clip:path={path}"])[0].label for path in ("a/b", "a/b/", "b")]
    assert labels == ["clip(path=b)"] * 3
    with pytest.raises(UsageError, match="or two are called so"):
        scorers_from(["clip:path=a/b,clip:path=c/b"])


def test_the_judge_is_no_reward_and_another_network_than_the_classifier():
    assert "judge" not in registry.names("reward")
    first, second = classifier.load(), judge.load()
    assert set(first.state_dict()) != set(second.state_dict())
    assert (FOLDER / "judge" / "model.safetensors").stat().st_size < 2**20
    names = json.loads((FOLDER / "judge" / "config.json").read_text())["concepts"]
    assert tuple(names) == sampler.bundled.concepts()
    assert second.features(torch.rand(2, 3, 40, 50)).shape == (2, 192)


def test_statistics_of_pixels():
    images = torch.rand(2, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    images[0, :, :5] = 1.0
    values = images.numpy()
    assert saturation(images).numpy() == pytest.approx((values.max(1) - values.min(1)).mean((1, 2)))
    outer = (values < 0.005) | (values > 0.995)
    assert clipped(images).numpy() == pytest.approx(outer.mean((1, 2, 3)))
    grey = np.tensordot([0.299, 0.587, 0.114], values, (0, 1))
    inner = grey[:, 1:-1, 1:-1]
    laplacian = (
        grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:] - 4 * inner
    )
    assert sharpness(images).numpy() == pytest.approx(laplacian.var((1, 2), ddof=1), rel=1e-4)


def test_a_distance_is_extrapolated_to_infinitely_many_images(monkeypatch):
    """Of a bias linear in 1/n nothing is left; of the same Gaussian less than at n."""
    torch.manual_seed(0)
    seen = torch.randn(600, 8)
    reference = classifier.feature_statistics(torch.randn(200_000, 8))
    biased = classifier.frechet_distance(*classifier.feature_statistics(seen), *reference)
    assert abs(features.extrapolate(seen, reference)) < 0.4 * biased
    monkeypatch.setattr(features, "_frechet", lambda found, _: 0.7 + 30 / len(found))
    assert features.extrapolate(seen, reference) == pytest.approx(0.7, abs=1e-9)


def test_a_reference_is_in_the_fingerprint(folder, tmp_path_factory):
    """Of its content, not of its place; a changed image is another reference."""
    place = tmp_path_factory.mktemp("references")
    copies = [place / name for name in ("a", "b", "changed")]
    for copy in copies:
        shutil.copytree(folder, copy)
    picture = sorted(copies[2].glob("*.png"))[0]
    Image.new("RGB", Image.open(picture).size, "red").save(picture)
    label = "kernel(bundled classifier)"
    found = [sampler.evaluate(folder, ["frechet", f"kernel:reference={copy}"]) for copy in copies]
    same, equal, other = (one.facts["scorers"][label] for one in found)
    assert same == equal != other
    assert "frechet(bundled classifier)" in found[0].facts["scorers"]


def test_distances_of_sets(folder):
    found = sampler.evaluate(folder, ["frechet", f"kernel:reference={folder}"])
    assert found["kernel(bundled classifier)"].mean == pytest.approx(
        sampler.metrics.kernel_distance(
            *[features._of_folder(str(folder), features.Extractor())] * 2
        )
    )
    images = [sampler.core.images.read(p) for p in sorted(folder.glob("*.png"))]
    seen = torch.cat([classifier.load().features(image) for image in images])
    wanted = classifier.frechet_distance(
        *classifier.feature_statistics(seen), *classifier.reference_statistics()
    )
    row = found["frechet(bundled classifier)"]
    assert row.mean == pytest.approx(wanted, rel=1e-4) and row.interval is None
    kernel = sampler.metrics.kernel_distance(seen, seen)
    assert found["kernel(bundled classifier)"].mean == pytest.approx(kernel, rel=1e-4)
    assert any("biased below 10,000 images" in note for note in found.notes)


def test_the_extrapolated_distance_removes_the_bias_of_few_images():
    """Features and reference of one Gaussian: the distance in the limit is 0."""
    draw = torch.Generator().manual_seed(1)
    sample = torch.randn(400, 6, generator=draw)
    unit = classifier.Statistics(torch.zeros(6).double(), torch.eye(6).double())
    plain = classifier.frechet_distance(*classifier.feature_statistics(sample), *unit)
    assert abs(features.extrapolate(sample, unit)) < 0.5 * plain


def test_seeds_depend_on_the_prompt_alone_and_a_shuffled_file_gives_the_same_lines():
    lines = [
        RawLine(f"file:{k}", {"prompt": text, "steps": "3"}, True) for k, text in enumerate(TEXTS)
    ]
    first = evaluation_lines(lines, 3)
    random.Random(0).shuffle(lines)
    again = evaluation_lines(lines[:5], 3)
    cells = [line.cells for line in first]
    assert len(first) == 24 and [line.cells for line in evaluation_lines(lines, 3)] == cells
    assert all(line.cells in cells for line in again)
    assert cells[0] == {"prompt": min(TEXTS), "steps": "3", "seed": seed_of(min(TEXTS), 0)}
    assert len({line.cells["seed"] for line in first}) == 24
    assert seed_of("a", 0, 1) != seed_of("a", 0, 0)
    twice = [RawLine(f"file:{k}", {"prompt": "a", "steps": k}, True) for k in (3, 2)]
    cells = [line.cells["steps"] for line in evaluation_lines(twice, 2)]
    assert cells == [line.cells["steps"] for line in evaluation_lines(twice[::-1], 2)]
    with pytest.raises(UsageError, match="--repeats and --seed"):
        evaluation_lines([RawLine("file:1", {"prompt": "a", "seed": "3"}, True)], 2)
