"""The playground's forms: controls from fields, and back to what the command line knows."""

import pytest

import sampler
from sampler import registry
from sampler.config.layers import from_sets
from sampler.config.model import ModelConfig
from sampler.core.errors import SamplerError
from sampler.ui.export import python, shell, short, yaml, yaml_scalar
from sampler.ui.fields import controls, explanations, spec
from sampler.ui.form import MAX_IMAGES, PageInput, StrategyChoice, config_of
from sampler.ui.studio import second_rule

EVERY = [(kind, name) for kind in ("sampler", "guidance") for name in registry.names(kind)]


def by_name(kind, name, given=None):
    return {control.name: control for control in controls(kind, name, given)}


def asked(form=None, sampler="ddim", guidance="cfg", **values):
    """A configuration of a form; values: of the guidance's controls."""
    chosen = {"sampler": StrategyChoice(sampler, {}), "guidance": StrategyChoice(guidance, values)}
    return config_of(form or PageInput("a fox", seed=1), chosen, ModelConfig())


def test_inputs_are_in_every_copied_text():
    given = {"image": "/x/a b.png", "strength": 0.5}
    config = asked(PageInput("a fox", seed=1, inputs=given))
    assert config.inputs == given
    assert "--input 'image=/x/a b.png' --input strength=0.5" in shell(config)
    assert 'inputs:\n  image: "/x/a b.png"\n  strength: 0.5\n' in yaml(config)
    assert f"    inputs={given!r},\n" in python(config, [1], 1)


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_every_field_has_a_control_and_untouched_controls_say_nothing(kind, name):
    found = by_name(kind, name)
    assert list(found) == [f["name"] for f in sampler.describe(kind, name)["fields"]]
    assert spec(kind, name, {n: control.shown for n, control in found.items()}) == {"name": name}


def test_the_form_of_a_control_follows_the_type_of_its_field():
    cfg, adaptive, ghvb = (
        by_name("guidance", "cfg"),
        by_name("guidance", "adaptive"),
        by_name("sampler", "ghvb"),
    )
    assert (cfg["scale"].form, cfg["scale"].shown, cfg["scale"].optional) == ("number", 7.5, False)
    assert cfg["interval"].form == "yaml" and cfg["interval"].optional
    assert cfg["rescale"].hint == "φ in 0..1; from 0 to 1 (0 is off)"
    assert adaptive["rule"].form == "rule" and adaptive["rule"].shown == "cfg"
    assert "apg" in adaptive["rule"].choices and by_name("guidance", "sum")["rules"].form == "yaml"
    assert adaptive["lag"].choices == (0, 1) and adaptive["compact"].form == "choice"
    assert (ghvb["order"].form, ghvb["order"].optional) == ("integer", True)
    assert ghvb["momentum_number"].form == "yaml"  # a number, or a name
    assert by_name("guidance", "autoguidance")["weak"].form == "text"
    assert by_name("guidance", "cfg", {"name": "cfg", "scale": 3.0})["scale"].shown == 3.0


def test_rules_inside_start_as_the_models_own():
    own = sampler.describe("guidance", "cfg")["fields"]
    own = {"name": "cfg", **{f["name"]: f["default"] for f in own}, "scale": 3.0}
    assert short("guidance", own) == {"name": "cfg", "scale": 3.0}
    given = {"rule": short("guidance", own)}
    shown = by_name("guidance", "forecast", given)["rule"].shown
    found = spec("guidance", "forecast", {"rule": shown})
    assert found == {"name": "forecast", "rule": {"name": "cfg", "scale": 3}}
    assert second_rule(own) == {"name": "apg", "scale": 3.0}
    assert second_rule({"name": "apg"}) == {"name": "none"}


def test_what_controls_hold_becomes_a_spec_that_builds():
    given = {"rule": "{name: apg, scale: 5}", "threshold": 0.9, "refresh": 4.0, "turn": None}
    found = spec("guidance", "adaptive", given)
    assert found == {
        "name": "adaptive",
        "rule": {"name": "apg", "scale": 5},
        "threshold": 0.9,
        "refresh": 4,
    }
    assert sampler.build("guidance", found).rule.scale == 5
    assert spec("guidance", "cfg", {"interval": "[0, 5]"}) == {"name": "cfg", "interval": [0, 5]}
    assert spec("guidance", "gfcg", {"interval": ""})["interval"] is None  # by default it is set
    assert spec("sampler", "ghvb", {"momentum_number": "1.8"})["momentum_number"] == 1.8


@pytest.mark.parametrize(
    ("form", "values", "sentence"),
    [
        (PageInput("\n  \n"), {}, "No prompts: write one per line."),
        (PageInput("a", steps=0), {}, "--steps: run.steps = 0 must be an integer from 1 to 1000."),
        (
            PageInput("a", steps=2.5),
            {},
            "--steps: run.steps = 2.5 must be an integer from 1 to 1000.",
        ),
        (
            PageInput("a", seed=-1),
            {},
            "--seed: run.seed = -1 must be an integer of at least 0 and below "
            "9,223,372,036,854,775,808.",
        ),
        (
            PageInput("a", n=MAX_IMAGES + 1),
            {},
            f"{MAX_IMAGES + 1} images exceed the limit of {MAX_IMAGES};",
        ),
        (
            PageInput("a"),
            {"scale": -1.0},
            "--guidance: cfg: scale = -1 must be a number of at least 0",
        ),
        (
            PageInput("a"),
            {"scale": None},
            "guidance 'cfg': field 'scale' is empty; its default is 7.5.",
        ),
        (PageInput("a"), {"interval": "[1"}, "guidance.interval:1: "),
        (PageInput("a"), {"interval": "later"}, "cfg: interval = 'later' must be (low, high)"),
        (
            PageInput("a"),
            {"rescale_space": "nowhere"},
            "cfg: rescale_space = 'nowhere' must be one of 'x0'",
        ),
    ],
)
def test_wrong_input_is_one_sentence(form, values, sentence):
    with pytest.raises((SamplerError, ValueError)) as caught:
        asked(form, **values)
    assert sentence.lower().rstrip(".") in str(caught.value).lower()
    assert "\n" not in str(caught.value)


def test_equal_prompts_are_asked_for_once_and_empty_numbers_are_defaults():
    config = asked(PageInput(" a fox \n\na dog\na fox\n", steps=None, seed=None, n=None))
    assert config.prompts.texts == ("a fox", "a dog")
    assert (config.run.steps, config.run.seed, config.run.n) == (20, None, 1)


def test_a_grid_is_that_of_the_command_line():
    chosen = {"sampler": StrategyChoice("ddim", {}), "guidance": StrategyChoice("none", {})}

    def grid(text, own=None):
        return config_of(PageInput("a", seed=1), chosen, ModelConfig(grid=own), text)

    assert "--grid karras" in shell(grid("karras")) and "grid: karras" in yaml(grid("karras"))
    assert "grid='karras'" in python(grid("karras"), [1], 1)
    assert grid("5, 1").model.grid == "5, 1" and grid("").model.grid is None
    assert grid("", "karras").model.grid is None  # cleared in the control
    assert grid("", [5.0, 1.0]).model.grid == [5.0, 1.0]


def test_the_words_are_read_back_as_the_values_that_they_say():
    for value in ("auto", "true", "1e3", "a b", 3.0, 1e-8, None, [1, 2.5], {"name": "cfg"}, "ä#'"):
        assert from_sets([f"guidance.x={yaml_scalar(value)}"])[0].tree["guidance"]["x"] == value


def test_texts_name_the_model_and_quote_what_a_shell_would_read():
    form = PageInput("-it's $HOME\na dog", "a # b", seed=3, n=2, steps=4, width=64)
    chosen = {"sampler": StrategyChoice("ab", {"order": 2}), "guidance": StrategyChoice("none", {})}
    config = config_of(form, chosen, ModelConfig(path="models/x", dtype="float16"))
    assert shell(config) == (
        "sampler generate --model models/x --dtype float16 --negative-prompt 'a # b' --seed 3 -n 2 "
        "--steps 4 --width 64 --sampler ab --set sampler.order=2 --guidance none "
        """-- '-it'"'"'s $HOME' 'a dog'"""
    )
    assert 'path: models/x\n  dtype: float16\n' in yaml(config)  # fmt: skip
    text = python(config, [3, 4, 3, 4], 4)
    assert "sampler.load('models/x', dtype='float16')" in text
    assert "seeds=[3, 4, 3, 4]" in text and "batch_size=4" in text and "width=64" in text


def test_explanations_are_read_from_the_lines_of_a_docstring():
    doc = "First.\n\n    a, b: what both\n        do here; more.\n    c: x " + "long " * 40
    assert explanations(doc) == {"a": "what both do here", "b": "what both do here"}
    assert explanations("First.\n\n    a: of [u; c]; more.\n") == {"a": "of [u; c]"}
