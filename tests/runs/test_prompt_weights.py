"""Prompt weights: how they are read, applied to encodings, and noted where they are not."""

import pytest

from sampler.core.prompt_weights import UNREAD, has_weights, weighted
from tests.runs.stub import RawLine, make


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("a fox", [("a fox", 1)]),
        ("a (red:1.5) fox", [("a ", 1), ("red", 1.5), (" fox", 1)]),
        ("a (red) [fox]", [("a ", 1), ("red", 1.1), (" ", 1), ("fox", 1 / 1.1)]),
        ("((red))", [("red", 1.1 * 1.1)]),
        ("((red) fox: big: .5 )", [("red", 1.1 * 0.5), (" fox: big", 0.5)]),
        (r"\(red\) \\ 1:2", [(r"(red) \ 1:2", 1)]),
        ("a (red", [("a ", 1), ("red", 1.1)]),
        ("red) :1.2) a]", [("red) :1.2) a]", 1)]),
        ("", [("", 1)]),
    ],
)
def test_weights_of_a_prompt(text, pieces):
    found = weighted(text)
    assert [piece for piece, _ in found] == [piece for piece, _ in pieces]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in pieces])


def test_explicit_weights_are_told_from_brackets():
    assert has_weights(["a", "a (red:1.5) fox"]) and has_weights(["(a: 1 )"])
    assert not has_weights(["a (red) fox", "ratio 1:2", r"\(red:1.5\)", "[a:b:0.5]"])


def test_weights_that_are_not_applied_are_noted_in_the_record(tmp_path):
    table = [RawLine("f:1", {"prompt": "a (red:1.5) fox"}), RawLine("f:2", {"prompt": "a (fox)"}),
             RawLine("f:3", {"prompt": "a", "negative_prompt": "(b:0.5)"})]  # fmt: skip
    run, tally = make(tmp_path / "run", table)
    entries = {job.index: run.results().entries[job.key]["warnings"] for job in run.jobs()}
    assert entries == {0: [UNREAD], 1: [], 2: [UNREAD]} and tally.done == 3
