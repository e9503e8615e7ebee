"""A snapshot on disk is data: it comes back equal, and it can run nothing."""

import json
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file

import sampler
from sampler.core.errors import SamplerError
from sampler.types import Snapshot


class State(NamedTuple):
    slopes: tuple[torch.Tensor, ...]
    note: str


def test_every_kind_of_state_comes_back(tmp_path):
    state = State((torch.randn(2, 3, dtype=torch.float64),), "kept")
    guidance = {"on": [True, None, 1.5], "mask": torch.tensor([True, False])}
    before = Snapshot(3, torch.randn(2, 3).half(), state, guidance, (1, 2**62), (6, 3))
    sampler.save_snapshot(before, tmp_path / "run.safetensors")
    after = sampler.load_snapshot(tmp_path / "run.safetensors")
    assert isinstance(after.sampler, State) and after.sampler.note == "kept"
    assert torch.equal(after.sampler.slopes[0], state.slopes[0])
    assert torch.equal(after.x, before.x) and after.x.dtype == torch.float16
    assert torch.equal(after.guidance["mask"], guidance["mask"])
    assert after.guidance["on"] == guidance["on"]
    assert (after.index, after.seeds, after.nfe) == (3, (1, 2**62), (6, 3))
    assert [p.name for p in tmp_path.iterdir()] == ["run.safetensors"]


def test_what_is_no_snapshot_is_refused(tmp_path):
    (tmp_path / "text").write_text("not a snapshot")
    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    named = {"tuple": [{"named": "os:system", "items": []}]}
    save_file(
        {"x": torch.zeros(1)}, tmp_path / "evil", {"format": "1", "snapshot": json.dumps(named)}
    )
    for name in ("text", "other", "evil", "missing"):
        with pytest.raises(SamplerError, match="is not a readable snapshot") as error:
            sampler.load_snapshot(tmp_path / name)
        assert error.value.code == 2


def test_a_state_that_is_no_value_is_refused(tmp_path):
    snapshot = Snapshot(0, torch.zeros(1), lambda: None, (), (), ())
    with pytest.raises(TypeError, match="holds function"):
        sampler.save_snapshot(snapshot, tmp_path / "s")
    assert list(tmp_path.iterdir()) == []
