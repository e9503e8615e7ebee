"""`sampler bench solvers`: distances to long runs, spreads and estimates of samplers on a model."""

import json

import pytest

import sampler
from sampler.calibration.solvers import FINER, REFERENCE, SAMPLERS, measured, name_of
from sampler.cli import main
from tests import tiny

RULE = {"name": "cfg", "scale": 3.0}
STEPS = (2, 4)


@pytest.fixture(scope="module")
def engine():
    return sampler.load(tiny.sd())


@pytest.fixture(scope="module")
def rows(engine):
    specs = ["ddim", "unipc", "heun", {"name": "ddim", "eta": 1.0}]
    return list(measured(engine, ["a", "b"], samplers=specs, steps=STEPS, guidance=RULE, seed=3))


def latents(engine, method, steps):
    options = {"seeds": 3, "guidance": RULE, "batch_size": 2, "output": "latent"}
    return engine.generate(["a", "b"], sampler=method, steps=steps, **options).latents


@pytest.fixture(scope="module")
def exact(engine):
    return latents(engine, REFERENCE, FINER * max(STEPS))


def relative(a, b):
    return float((a - b).double().norm() / b.double().norm())


def test_distance_and_spread_are_relative_to_the_long_run(engine, rows, exact):
    for row in rows[:6]:
        steps = row.steps // 2 if row.sampler == "heun" else row.steps  # equal cost
        made = latents(engine, row.sampler, steps)
        assert row.distance == pytest.approx(relative(made, exact), rel=1e-4)
        assert row.spread == pytest.approx(float(made.norm() / exact.norm()), rel=1e-4)
    assert [row.nfe for row in rows] == [4, 8, 4, 8, 2, 6, 4, 8]


def test_a_stochastic_sampler_is_compared_with_its_own_long_run(engine, rows):
    path = {"name": "ddim", "eta": 1.0, "noise": "path"}
    exact = latents(engine, path, FINER * max(STEPS))
    found = [row.distance for row in rows[6:]]
    right = [relative(latents(engine, path, steps), exact) for steps in STEPS]
    assert found == pytest.approx(right, rel=1e-4)
    (alone,) = measured(
        engine, ["a"], samplers=[path], steps=[2], guidance=RULE, own_paths=False, finer=2
    )
    assert alone.distance is None and alone.spread > 0


def test_the_estimate_is_that_of_the_result_in_units_of_the_long_run(rows, exact):
    scale = float(exact.double().square().mean().sqrt())
    estimate = rows[3].result.solver_error
    assert rows[3].solver_error == pytest.approx(sum(estimate) / 2 / scale, rel=1e-4)
    assert rows[4].solver_error is None


def test_every_usual_sampler_builds_and_has_a_name():
    names = [name_of(spec) for spec in SAMPLERS]
    assert len(set(names)) == len(names) and "ab 2" in names
    assert all(sampler.build("sampler", spec) for spec in SAMPLERS)


def test_no_prompts(engine):
    with pytest.raises(ValueError, match="at least one prompt"):
        next(measured(engine, []))


def test_the_command(engine, tmp_path, capsys):
    engine.pipeline.pipe.save_pretrained(tmp_path / "model")
    arguments = ["bench", "solvers", str(tmp_path / "model"), "--steps", "2", "--json", "-q"]
    options = ["--sampler", "DPM++ 2M", "--sampler", "ddim", "--grid", "simple", "--grid", "beta"]
    assert main([*arguments, *options]) == 0, capsys.readouterr().err
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    rows = [row for row in printed if row["t"] == "solver"]
    assert [(row["sampler"], row["grid"]) for row in rows] == [
        ("DPM++ 2M", "simple"), ("DPM++ 2M", "beta"), ("ddim", "simple"), ("ddim", "beta"),
    ]  # fmt: skip
    assert all(row["distance"] > 0 and row["nfe"] for row in rows)
    assert main(["bench", "solvers", str(tmp_path / "model"), "--sampler", "dimd"]) == 2
    assert "did you mean 'ddim'" in capsys.readouterr().err


def test_bench_without_a_command_is_that_of_the_runs(capsys):
    assert main(["bench", "--kernels", "--json"]) == 0
    assert "CFG + DDIM" in capsys.readouterr().out
