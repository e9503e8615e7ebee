"""Names, specs and their errors; third parties come through entry points."""

from dataclasses import MISSING, dataclass, fields
from importlib.metadata import EntryPoint
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch
from annotated_types import DocInfo, Ge, Gt, Le, Lt

import sampler
from sampler import registry
from sampler.guidance.cfg import CFG
from sampler.registry.constraints import FloatOrTensor, PerSample, checked, checked_value
from sampler.types import SamplerBase


def test_a_name_a_mapping_and_an_instance_are_the_same():
    assert sampler.build("guidance", "cfg") == CFG()
    assert sampler.build("guidance", {"name": "cfg", "scale": 3}) == CFG(scale=3)
    rule = CFG(scale=2.0)
    assert sampler.build("guidance", rule) is rule
    assert sampler.build("guidance", {"name": "cfg", "interval": [0.2, 5]}).interval == (0.2, 5.0)
    assert registry.spec_of(rule)["scale"] == 2.0


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cgf", "did you mean 'cfg'"),
        ({"name": "cfg", "scal": 3}, "did you mean 'scale'"),
        ({"name": "cfg", "scale": "high"}, "scale = 'high' must be a number of at least 0"),
        ({"name": "cfg", "scale": float("nan")}, "finite number"),
        ({"name": "cfg", "scale": -1}, "scale = -1"),
        ({"name": "cfg", "rescale": 2}, "rescale = 2"),
        ({"name": "cfg", "interval": [5, 1]}, "low < high"),
        ({"scale": 3}, "needs 'name'"),
        (7, "not 7"),
        (CFG, "an instance"),
    ],
)
def test_wrong_specs_are_one_sentence(spec, message):
    with pytest.raises(ValueError, match=message) as error:
        sampler.build("guidance", spec)
    assert "\n" not in str(error.value)


def test_unknown_kind_and_duplicate_names():
    with pytest.raises(ValueError, match="did you mean 'sampler'"):
        sampler.names("samplers")
    with pytest.raises(ValueError, match="registered already"):
        sampler.register("sampler", "ddim")(dataclass(frozen=True)(type("Other", (), {})))


def test_describe_tells_fields_and_reference():
    told = sampler.describe("sampler", "ddim")
    assert told["fields"] == [
        {
            "name": "eta",
            "type": "float",
            "default": 0.0,
            "range": "from 0 to 1 (0 is deterministic)",
        },
        {"name": "noise", "type": "Literal['step', 'path']", "default": "step", "range": ""},
    ]
    assert "2010.02502" in told["reference"] and told["summary"]


@dataclass(frozen=True)
class Plugged(SamplerBase):
    """A third party's sampler."""

    gain: float = 1.0

    def step(self, x: Any, pred: Any, span: Any, state: Any) -> Any: ...


def test_third_parties_by_entry_point_and_a_broken_one(monkeypatch):
    entries = {
        "plugged": EntryPoint("plugged", f"{__name__}:Plugged", "sampler.samplers"),
        "broken": EntryPoint("broken", "no_such_module:Thing", "sampler.samplers"),
    }
    monkeypatch.setattr(registry, "_plugins", lambda kind: entries if kind == "sampler" else {})
    monkeypatch.setitem(registry._registered, "sampler", dict(registry._registered["sampler"]))
    assert {"plugged", "broken"} <= set(sampler.names("sampler"))
    assert type(sampler.build("sampler", {"name": "plugged", "gain": 2.0})).name == "plugged"
    with pytest.raises(ValueError, match="'broken' of .* failed to load"):
        sampler.build("sampler", "broken")


def test_the_bases_have_the_defaults_of_all_methods():
    method, rule, cond = Plugged(), sampler.GuidanceBase(), sampler.Cond("c")
    assert method.bind(None) is method and method.with_schedule(None) is method
    assert (method.evaluations, method.follows_direction, method.stochastic) == (1, False, False)
    assert rule.bind(None, cond) == (rule, cond) and rule.check(None) is None
    assert (rule.sets_direction, rule.graph_refusal) == (False, "")


@dataclass(frozen=True)
class OwnStep:
    """A sampler without the base; `evaluations` is a field of its own."""

    evaluations: int

    def step(self, x: Any, pred: Any, span: Any, state: Any) -> sampler.Move:
        return sampler.Move(span.next.alpha * pred.x0 + span.next.sigma * pred.eps)


class OwnCombine:
    """A rule without the base, with a `bind` of its own."""

    name = "own_combine"

    def bind(self, context: Any, cond: sampler.Cond) -> tuple[Any, sampler.Cond]:
        return self, sampler.Cond("bound")

    def combine(self, x: Any, preds: Any, span: Any, state: Any) -> Any:
        return preds["cond"], state


def test_a_strategy_without_the_base_gets_what_it_lacks():
    rule = sampler.build("guidance", OwnCombine())
    assert rule.needs == {"cond"} and not rule.sets_direction and rule.check(None) is None
    assert rule.name == "own_combine" and rule.bind(None, sampler.Cond())[1].cond == "bound"
    method = sampler.build("sampler", OwnStep(1))
    assert method.evaluations == 1 and method.bind(None) is method
    levels = [sampler.Level(t, 1 - t / 10, t / 10) for t in (9, 5, 1)]
    engine = sampler.Engine(sampler.denoiser(lambda x, t, c: 0.5 * x, "eps"))
    x = torch.ones(1, 2)
    assert torch.equal(
        engine.run(x, levels, None, method, rule), engine.run(x, levels, None, "ddim", "none")
    )


def test_an_object_that_cannot_get_the_defaults_is_refused():
    with pytest.raises(ValueError, match="derive its class from sampler.SamplerBase") as error:
        sampler.build("sampler", SimpleNamespace(step=None))
    assert "\n" not in str(error.value)


@dataclass(frozen=True)
class Bounded:
    """Every kind of range."""

    least: Annotated[float, Ge(0)] = 0.0
    half_open: Annotated[float, Gt(0), Le(1)] = 1.0
    below: Annotated[int, Ge(2), Lt(5), DocInfo("2 is off")] | None = None
    choice: Literal["a", "b", "c"] = "a"
    pair: tuple[int, int] = (0, 1)
    per_sample: Annotated[FloatOrTensor, Ge(0), PerSample] = 1.0


Checked = checked("bounded")(Bounded)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("least", -0.1, "a number of at least 0"),
        ("least", float("inf"), "a finite number of at least 0"),
        ("least", True, "a number of at least 0"),
        ("least", "1", "a number of at least 0"),
        ("half_open", 0, "a number above 0 and at most 1"),
        ("half_open", 1.01, "a number above 0 and at most 1"),
        ("below", 5, "an integer of at least 2 and below 5 (2 is off), or None"),
        ("below", 3.5, "an integer of at least 2 and below 5 (2 is off), or None"),
        ("choice", "d", "one of 'a', 'b', 'c'"),
        ("pair", (1,), "a list of 2 integers"),
        ("per_sample", torch.tensor([1.0, -2.0]), "a number of at least 0"),
        ("least", torch.tensor([1.0, 2.0]), "a number of at least 0"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field, value, allowed):
    with pytest.raises(ValueError) as error:
        Checked(**{field: value})
    sentence = str(error.value)
    assert sentence.startswith(f"bounded: {field} = ") and sentence.endswith(f"must be {allowed}.")


def test_values_in_range_become_the_types_of_their_fields():
    made = Checked(least=np.float32(0.5), below=np.int64(2), pair=[3, 4], half_open=1)
    assert made == Bounded(0.5, 1.0, 2, "a", (3, 4))
    assert type(made.least) is float and type(made.below) is int
    scales = torch.tensor([0.0, 2.0])
    assert Checked(per_sample=scales).per_sample is scales


def test_construction_is_checked_as_the_registry_does():
    with pytest.raises(ValueError, match=r"^cfg: scale = -1 must be a number of at least 0"):
        CFG(scale=-1)
    with pytest.raises(ValueError, match=r"^cfg: interval = \(5.0, 1.0\) must be \(low, high\)"):
        CFG(interval=(5.0, 1.0))


@pytest.mark.parametrize("kind", sorted(registry.KINDS))
def test_defaults_are_in_range(kind):
    for name in registry.names(kind):
        cls = registry.lookup(kind, name)
        for entry in fields(cls):
            if entry.init and entry.default is not MISSING and not entry.metadata.get("kind"):
                checked_value(cls, entry.name, entry.default, name)
