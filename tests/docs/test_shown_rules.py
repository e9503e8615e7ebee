"""No rule that a page, a preset, a recipe or the playground shows clips more values than plain CFG.

Clipped: share of values <= 1/255 or >= 254/255 of the bundled model's images, for few steps of two
samplers, beside `cfg` at the rule's own scale with the same prompts and seeds.
"""

import ast
import csv
import json

import pytest
import torch

import sampler
from sampler import registry
from sampler.bundled import prompts
from sampler.bundled.measures import clipped_share
from sampler.config.layers import PRESETS, from_sets, read_file, resolve
from sampler.ui.studio import second_rule
from tests.docs.pages import PAGES, ROOT, blocks
from tests.docs.test_blocks import lines

PROMPTS = [prompt.text for prompt in prompts(4)]
# Rules that go on with older predictions are shown with the default number of steps: linear_ag's
# coefficients are for 20 steps of ddim, and a direction that is held gets old in fewer steps.
STEPS = {"linear_ag": 20, "adaptive": 20}
# Rules for other networks or with an image of their own, and presets that say in their first line
# that they are a paper's.
ELSEWHERE = {"embedded", "student", "none", "classifier", "gfcg", "nag", "cads", "blend"}
NOT_OURS = {"apg_paper.yaml"}


def in_python(text):
    """The specs written as dicts, with their variables, and `guidance="name"`."""
    tree, known = ast.parse(text), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            known[node.targets[0].id] = node.value
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            node.values = [known.get(getattr(v, "id", ""), v) for v in node.values]
        if isinstance(node, ast.Dict):
            try:
                yield ast.literal_eval(node)
            except ValueError:
                continue
        if isinstance(node, ast.keyword) and node.arg == "guidance":
            if isinstance(node.value, ast.Constant):
                yield {"name": node.value.value}


def in_shell(text):
    """The rule that a command's options name, and those of a sweep's axes."""
    for words in lines(text):
        pairs = dict(zip(words, words[1:], strict=False))
        sets = [b for a, b in zip(words, words[1:], strict=False) if a == "--set"]
        sets = [s for s in sets if s.startswith("guidance.")]
        axes = [b for a, b in zip(words, words[1:], strict=False) if a == "--axis"]
        axes = dict(axis.split("=", 1) for axis in axes)
        for name in axes.get("guidance", pairs.get("--guidance", "cfg")).split(","):
            if name not in registry.names("guidance"):  # of an example's own distribution
                continue
            spec = resolve([], from_sets([f"guidance.name={name}", *sets]), []).guidance
            scales = axes.get("scale", "")
            for scale in scales.split(",") if "." not in scales else [""]:
                yield {**spec, "scale": float(scale)} if scale else spec


def in_file(path):
    rule = resolve([read_file(path)], [], []).guidance
    yield {"name": rule} if isinstance(rule, str) else rule or {}


def shown():
    """{spec as JSON: where it is first shown}, without plain cfg."""
    for page in PAGES:
        for text in blocks(page, "python"):
            yield from ((spec, page) for spec in in_python(text))
        for text in blocks(page, "sh"):
            yield from ((spec, page) for spec in in_shell(text))
    for path in (*sorted((ROOT / "configs").glob("*.yaml")), *sorted(PRESETS.glob("*.yaml"))):
        if path.name not in NOT_OURS:
            yield from ((spec, path.name) for spec in in_file(path))
    yield second_rule({"name": "cfg", "scale": 7.5}), "the playground"


def rules():
    found = {}
    for spec, place in shown():
        name = spec.get("name")
        if name in registry.names("guidance") and name not in ELSEWHERE and set(spec) - {"name"}:
            found.setdefault(json.dumps(spec, sort_keys=True), place)
        elif name == "apg":
            found.setdefault(json.dumps(spec), place)
    return {k: v for k, v in found.items() if set(json.loads(k)) != {"name", "scale"} or "apg" in k}


def scale_of(spec):
    """The scale of a rule or of the one inside; the model's own where there is none."""
    rule = sampler.build("guidance", spec)
    while rule is not None and not hasattr(rule, "scale"):
        rule = getattr(rule, "rule", None)
    return 3.0 if rule is None else rule.scale


@pytest.fixture(scope="module")
def share():
    engine, known = sampler.load(), {}

    def of(method, rule, steps):
        key = (method, json.dumps(rule, sort_keys=True), steps)
        if key not in known:
            options = {"steps": steps, "sampler": method, "output": "tensor", "batch_size": 4}
            made = engine.generate(PROMPTS, seeds=3, guidance=rule, **options)
            known[key] = clipped_share(made.images)
        return known[key]

    return of


RULES = rules()


def test_the_readme_the_tour_and_the_recipes_show_rules():
    assert {"README.md", "docs/index.md", "the playground"} <= {*RULES.values()} | {
        place for spec, place in shown() if spec.get("name") == "apg"
    }


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{RULES[rule]}: {rule}")
def test_a_rule_that_is_shown_clips_no_more_than_cfg(share, rule):
    spec = json.loads(rule)
    steps = STEPS.get(spec["name"], 8)
    for method in ("ddim",) if spec["name"] == "linear_ag" else ("ddim", "ghvb"):
        plain = share(method, {"name": "cfg", "scale": scale_of(spec)}, steps)
        assert share(method, spec, steps) <= plain + 0.002, (method, plain)


def test_the_paper_preset_is_the_paper_setting():
    """And does clip more at this size, which is why it is not the default."""
    (spec,) = in_file(PRESETS / "apg_paper.yaml")
    rule = sampler.build("guidance", spec)
    assert (rule.momentum, rule.norm_threshold, rule.r_rel) == (-0.5, 15.0, None)


def test_the_defaults_of_apg_clip_less_than_cfg_in_every_setting_of_the_study():
    with (ROOT / "docs/figures/apg_steps.csv").open() as file:
        rows = {
            (r["sampler"], r["scale"], int(r["steps"]), r["rule"]): float(r["clipped"])
            for r in csv.DictReader(file)
        }
    settings = {key[:3] for key in rows}
    assert {steps for _, _, steps in settings} >= {4, 50} and len(settings) == 32
    for setting in settings:
        assert rows[(*setting, "apg, relative clip")] < rows[(*setting, "cfg")]
    default = sampler.build("guidance", "apg")
    relative = sampler.build("guidance", {"name": "apg", "momentum": 0.0, "r_rel": 0.0586})
    c, u = (torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    level = sampler.Level(0, 0.6, 0.8)
    preds = {k: sampler.Prediction.from_v(c, v, level) for k, v in (("cond", c), ("uncond", u))}
    at = sampler.Span(0, level, level)
    found = [rule.combine(c, preds, at, None)[0].x0.tensor() for rule in (default, relative)]
    assert torch.equal(*found)
