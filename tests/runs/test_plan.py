"""Keys, seeds, duplicates and batches: pure functions of rows, model and batch size."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from sampler import registry
from sampler.config.model import ModelConfig
from sampler.config.schema import Limits
from sampler.core.errors import SamplerError
from sampler.models import folder
from sampler.runs import fingerprint
from sampler.runs.folder import key_in
from sampler.runs.jobs import Job, JobSettings, Keys, Model, canonical, key_of, record_of
from sampler.runs.plan import batch_key
from sampler.runs.planner import Planner
from sampler.runs.readers import RawLine
from sampler.runs.settings import complete_spec
from tests import tiny
from tests.runs.stub import MODEL, defaults


def plan(table, batch_size=4, default=None, text=False, **options):
    """(jobs, plan) of some rows."""
    planner = Planner(MODEL, default or defaults(), batch_size, **options)
    table = [RawLine(f"f:{k}", cells, text) for k, cells in enumerate(table, 1)]
    jobs = list(planner.jobs(table))
    return jobs, planner.plan


def refused(*arguments, **options):
    with pytest.raises(SamplerError) as caught:
        plan(*arguments, **options)
    assert caught.value.code == 2 and "\n" not in str(caught.value)
    return str(caught.value)


def test_keys_are_hashes_of_the_whole_record():
    table = [{"prompt": "é", "negative_prompt": "n", "seed": 3}, {"prompt": "b", "steps": 7}]
    jobs, made = plan(table)
    for job in jobs:
        record = record_of(job, made.groups[job.group], MODEL)
        assert job.key == key_of(record) and len(job.key) == 20
        assert json.loads(canonical(record)) == json.loads(json.dumps(record))
    assert Job.parse(jobs[0].encode()) == jobs[0]
    assert key_in(jobs[0].encode()) == jobs[0].key


def test_everything_that_changes_the_image_changes_the_key():
    base = {"prompt": "a", "seed": 1}
    variants = [
        base, {**base, "prompt": "b"}, {**base, "seed": 2}, {**base, "negative_prompt": "x"},
        {**base, "steps": 9}, {**base, "width": 24}, {**base, "height": 24}, {**base, "scale": 1.5},
        {**base, "sampler": "ab"}, {**base, "guidance": "none"}, {**base, "sampler.eta": 0.5},
    ]  # fmt: skip
    jobs, _ = plan(variants)
    assert len({job.key for job in jobs}) == len(variants)
    other = Planner(Model("files:" + "6" * 64, native=(16, 16)), defaults())
    (job,) = other.jobs([RawLine("f:1", base)])
    assert job.key != jobs[0].key
    labels = [{**base, "tag": "t", "meta_x": 1}]
    assert plan(labels)[0][0].key == jobs[0].key


def test_equal_text_in_other_code_points_is_equal():
    keys = {key_of({"p": "é"}), key_of({"p": "e\u0301"})}
    assert len(keys) == 1
    with pytest.raises(ValueError):
        key_of({"a": float("nan")})
    shared = JobSettings(
        3, 8, 8, complete_spec("sampler", "ddim"), complete_spec("guidance", "none")
    )
    keyed = Keys(shared, MODEL)
    assert keyed.key("a", "", 0, 5) == key_of(
        record_of(Job(0, "", 0, 0, "a", "", 5), shared, MODEL)
    )


def test_seeds_are_given_counted_or_derived():
    jobs, _ = plan([{"prompt": "a", "seed": 5, "n": 3}, {"prompt": "b"}, {"prompt": "b", "n": 2}])
    assert [job.seed for job in jobs[:3]] == [5, 6, 7]
    derived = [job.seed for job in jobs[3:]]
    assert len(derived) == 2, "the row b is the first copy of the row b, n = 2"
    assert all(0 <= seed < 2**63 for seed in derived) and derived[0] != derived[1]
    assert [job.seed for job in plan([{"prompt": "b", "n": 2}])[0]] == derived
    given, _ = plan([{"prompt": "a"}, {"prompt": "b", "n": 2}], default=defaults(seed=9))
    assert [job.seed for job in given] == [9, 9, 10]
    assert "more than 2^63" in refused([{"prompt": "a", "seed": 2**63 - 1, "n": 2}])


def test_random_seeds_are_drawn_once_a_run_and_each_row_has_its_own():
    table = [
        {"prompt": "a", "seed": -1, "n": 2},
        {"prompt": "a", "seed": "random"},
        {"prompt": "a"},
    ]
    jobs, _ = plan(table, default=defaults(seed=9, drawn=5))
    assert jobs[1].seed == jobs[0].seed + 1 and jobs[3].seed == 9
    seeds = {job.seed for job in jobs}
    assert len(seeds) == 4 and all(0 <= seed < 2**53 for seed in seeds)
    assert plan(table, default=defaults(seed=9, drawn=5))[0] == jobs
    assert plan(table, default=defaults(seed=9, drawn=6))[0][0].seed != jobs[0].seed
    assert plan(table, default=defaults(seed=9))[0][0].seed != plan(table)[0][0].seed
    jobs, _ = plan(
        [{"prompt": "a"}, {"prompt": "b", "n": 2}], default=defaults(seed="random", drawn=7)
    )
    assert [job.seed for job in jobs] == [7, 7, 8]


def test_prompts_of_several_lines_and_extra_columns():
    jobs, _ = plan([{"prompt": "a\r\nb", "negative_prompt": "c\nd", "meta_x": "e\nf"}])
    assert (jobs[0].prompt, jobs[0].negative_prompt) == ("a\nb", "c\nd")
    assert jobs[0].meta == {"meta_x": "e\nf"}
    row = {"prompt": "a", "id": 7, "meta_y": [1]}
    assert "--extra-columns keep records it as meta_id" in refused([row])
    planner = Planner(MODEL, defaults(), keep_extra=True)
    (job,) = planner.jobs([RawLine("f:1", row)])
    assert job.meta == {"meta_id": 7, "meta_y": [1]} and planner.extra == {"id"}
    with pytest.raises(SamplerError, match="meta_id: is given twice"):
        list(Planner(MODEL, defaults(), keep_extra=True).jobs([RawLine("", {**row, "meta_id": 1})]))


def test_duplicates_are_made_once_and_recorded():
    table = [{"prompt": "a", "seed": 1}, {"prompt": "b", "seed": 1}, {"prompt": "a", "seed": 1}]
    jobs, made = plan(table)
    assert [job.prompt for job in jobs] == ["a", "b"] and made.duplicates == [(2, 0)]
    jobs, made = plan(table, dedupe=False)
    assert [job.replica for job in jobs] == [0, 0, 1] and len({job.key for job in jobs}) == 3
    for job in jobs:
        assert job.key == key_of(record_of(job, made.groups[job.group], MODEL))


def test_batches_are_cut_by_settings_in_input_order():
    table = [{"prompt": f"p{k}", "steps": 3 + k % 2} for k in range(10)]
    jobs, made = plan(table, batch_size=3)
    batches = made.batches()
    assert [list(batch.jobs) for batch in batches] == [[0, 2, 4], [1, 3, 5], [6, 8], [7, 9]]
    assert all(jobs[i].group == batch.group for batch in batches for i in batch.jobs)
    assert plan(table, batch_size=3)[1].hash == made.hash != plan(table, batch_size=2)[1].hash


def test_rows_that_differ_in_scale_alone_share_batches():
    """Of rules that take a scale per row; 0 and 1, which cost one evaluation, stay apart."""
    rows = [{"prompt": str(k), "scale": scale} for k, scale in enumerate([2, 3, 1, 5, 2, 0, 7])]
    _, found = plan(rows, 3)
    assert [list(batch.jobs) for batch in found.batches()] == [[0, 1, 3], [2], [4, 6], [5]]
    assert [batch.group for batch in found.batches()] == [0, 2, 0, 4]
    for other in ({"guidance": {"name": "apg", "eta": 0.5}}, {"steps": 7},
                  {"guidance": {"name": "adaptive", "rule": "cfg"}}):  # fmt: skip
        _, found = plan([{**row, **(other if k % 2 else {})} for k, row in enumerate(rows)], 9)
        mixed = [{k % 2 for k in batch.jobs} for batch in found.batches()]
        assert all(len(kinds) == 1 for kinds in mixed)
    calibrated = {"sampler": {"name": "ghvb", "momentum_number": "calibrated:x.json"}}
    settings = JobSettings(3, 8, 8, calibrated["sampler"], {"name": "cfg", "scale": 2.0})
    assert batch_key(settings) != batch_key(
        replace(settings, guidance={"name": "cfg", "scale": 3.0})
    )


def test_the_automatic_batch_size_goes_by_pixels_alone():
    _, small = plan([{"prompt": str(k)} for k in range(100)], "auto")
    assert max(len(batch.jobs) for batch in small.batches()) == 16
    _, large = plan([{"prompt": str(k), "width": 1024, "height": 1024} for k in range(5)], "auto")
    assert [len(batch.jobs) for batch in large.batches()] == [2, 2, 1]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a", "stpes": 3}, "'stpes': unknown column (did you mean 'steps'?)"),
        ({"prompt": "a", "steps": 1001}, "steps: 1001"),
        ({"prompt": "a", "steps": "3"}, "steps = '3' must be an integer of at least 1"),
        ({"prompt": "a", "scale": float("nan")}, "scale"),
        ({"prompt": "a", "scale": 3, "guidance": "none"}, "'none' has no scale"),
        ({"prompt": "a", "width": 12}, "width = 12 must be a multiple of 8"),
        ({"prompt": "a", "width": 8192, "height": 8192}, "16777216 pixels"),
        ({"prompt": "a\x00"}, "control character U+0000"),
        ({"prompt": "a\ud800"}, "control character U+D800"),
        ({"prompt": "a" * 20_001}, "20000 characters"),
        ({"prompt": "a", "sampler": "ddmi"}, "did you mean 'ddim'"),
        ({"prompt": "a", "sampler.etta": 1}, "did you mean 'eta'"),
        ({"prompt": "a", "guidance.rule.scale": 1}, "no rule"),
        ({"prompt": "a", "seed": -2}, "seed = -2 must be an integer from -1 to"),
        ({"prompt": "a", "meta_x": "\x1b[1m"}, "meta_x"),
        ({}, "prompt is missing"),
    ],
)
def test_a_wrong_row_is_one_sentence_with_its_place(row, words):
    message = refused([{"prompt": "fine"}, row])
    assert message.startswith("f:2: ") and words in message, message


def test_wrong_rows_can_be_skipped_but_not_too_many_images():
    skipped = []
    table = [{"prompt": "a"}, {"prompt": "b", "steps": 0}, {"prompt": "c"}]
    jobs, _ = plan(table, on_skip=skipped.append)
    assert [job.prompt for job in jobs] == ["a", "c"] and "f:2" in str(skipped[0])
    few = defaults(limits=Limits(max_jobs=2))
    with pytest.raises(SamplerError, match="More than 2 images"):
        plan([{"prompt": str(k)} for k in range(3)], default=few, on_skip=skipped.append)


def test_a_scale_reaches_the_rule_inside():
    (job,), made = plan([{"prompt": "a", "guidance": {"name": "adaptive"}, "scale": 2.5}])
    guidance = made.groups[job.group].guidance
    assert guidance["name"] == "adaptive" and guidance["rule"]["scale"] == 2.5
    (job,), made = plan([{"prompt": "a", "guidance": "adaptive", "guidance.rule.scale": 4}])
    assert made.groups[job.group].guidance["rule"]["scale"] == 4


def test_random_variants_depend_on_seed_and_number_alone():
    table = [{"prompt": "{a|b|c} {1|2}", "n": 8}]
    first, _ = plan(table, expand="random")
    again, _ = plan(table, expand="random")
    assert first == again and len({job.prompt for job in first}) > 2
    every, _ = plan([{"prompt": "{a|b|c} {1|2}"}], expand="all")
    assert [job.prompt for job in every] == ["a 1", "a 2", "b 1", "b 2", "c 1", "c 2"]
    assert plan([{"prompt": "{a|b}"}])[0][0].prompt == "{a|b}", "off unless it is asked for"


def test_the_size_and_scale_of_a_model_are_known_without_loading_it():
    import sampler
    from sampler.bundled import FOLDER

    engine = sampler.load()
    adapter = engine.pipeline
    model = fingerprint.model_of(ModelConfig())
    assert model.native == adapter.size(None, None)
    assert folder.default_strategies(None)["guidance"]["scale"] == engine.guidance.scale
    import inspect

    import diffusers

    for name, scale in folder.SCALES.items():
        call = inspect.signature(getattr(diffusers, name).__call__)
        assert scale == call.parameters["guidance_scale"].default
    fast = fingerprint.fingerprint(FOLDER / "pipeline", fast=True)
    assert fast.startswith("fast:") and fast == fingerprint.fingerprint(FOLDER / "pipeline", True)


@pytest.mark.parametrize("build", [tiny.sd, tiny.sdxl, tiny.pixart])
def test_defaults_are_those_of_the_loaded_model(build, tmp_path):
    import sampler

    build().save_pretrained(tmp_path, safe_serialization=True)
    engine, known = sampler.load(tmp_path), folder.default_strategies(str(tmp_path))
    found = {kind: registry.spec_of(getattr(engine, kind)) for kind in ("sampler", "guidance")}
    assert known is not None
    assert found == {kind: complete_spec(kind, known[kind]) for kind in found}


def test_a_family_whose_defaults_only_loading_tells(tmp_path, capsys):
    """A few-step student: its own sampler, and no guess in a dry run."""
    from sampler.bundled import FOLDER
    from sampler.cli import main

    model = shutil.copytree(FOLDER / "pipeline", tmp_path / "m")
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        path = model / name
        path.write_text(path.read_text().replace("DDIMScheduler", "LCMScheduler"))
    assert folder.default_strategies(str(model)) is None
    line = ["generate", "a fox", "--model", str(model), "--steps", "2", "-q"]
    assert main([*line, "--dry-run"]) == 2
    assert "--sampler" in capsys.readouterr().err
    assert main([*line, "--dry-run", "--sampler", "ddim", "--guidance", "none"]) == 0
    assert main([*line, "-o", str(tmp_path / "run")]) == 0
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["groups"][0]["sampler"]["name"] == "consistency"


def test_a_changed_weight_changes_the_fingerprint(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = tmp_path / "m"
    model.mkdir()
    (model / "model_index.json").write_text("{}")
    weights = model / "w.safetensors"
    weights.write_bytes(bytes(5000))
    for fast in (False, True):
        before = fingerprint.fingerprint(model, fast)
        assert before == fingerprint.fingerprint(model, fast)
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        assert fingerprint.fingerprint(model, fast) != before


def test_planning_imports_no_torch():
    code = (
        "import sys, sampler.runs.planner, sampler.runs.start, sampler.runs.verify, "
        "sampler.runs.gallery, sampler.runs.export, sampler.cli.batch; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)
