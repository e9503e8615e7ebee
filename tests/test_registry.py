"""Names, specs and their errors; third parties come through entry points."""

from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any

import pytest

import sampler
from sampler import registry
from sampler.guidance.cfg import CFG
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
        ({"name": "cfg", "scale": "high"}, "'scale' = 'high'"),
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
    assert told["fields"] == [{"name": "eta", "type": "float", "default": 0.0}]
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
