"""Solving of a stock pipeline's guidance formula from the numbers of one step.

The coefficients of `forms.py` by least squares in float64, in the differences O_k − O_0, which stay
accurate where the branches are close.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sampler.stock.forms import TOLERANCE_HALF, Form, Given, Unsolved, tolerance
from sampler.stock.frame_scales import scaled_by_frame
from sampler.stock.preconditioning import SLOPES, Preconditioning, preconditionings
from sampler.stock.readings import Part, Region, frames, rows_like
from sampler.stock.rescaling import relative, rescaled
from sampler.stock.roles import named, sums_to_one

IDLE = 1e-4  # share of the largest weight below which a branch may be no part of the formula
MOST = 4  # branches of a formula


class Reading(NamedTuple):
    """A reading of a step: target = Σ_k a_k · blocks_k is to be solved for a.

    unit: what the norm of the residual is relative to. complete: of all calls.
    """

    form: Form
    blocks: list[Tensor]
    target: Tensor
    unit: Tensor
    complete: bool

    def of(self, region: Region) -> Reading:
        """The reading of a part of the sample."""
        blocks = [region.of(block) for block in self.blocks]
        form = replace(self.form, region=region)
        target, unit = region.of(self.target), region.of(self.unit)
        return Reading(form, blocks, target, unit, self.complete)

    def error(self, weights: Sequence[float]) -> float:
        """‖target − Σ a·blocks‖ / ‖unit‖."""
        pairs = zip(weights, self.blocks, strict=True)
        made = sum((w * b.double() for w, b in pairs if w), 0 * self.target)
        return float(torch.dist(made, self.target)) / max(_length(self.unit), 1e-300)


def solve(given: Given, name: str) -> Form:
    """Solve the formula of a step; name: of the pipeline class, for the order of three branches.

    Raises Unsolved with a sentence for formulas that rescale, that are no sum of the branches, or
    whose order is not known.
    """
    bar = tolerance(given.output, *given.answers)
    if not given.output.isfinite().all():
        raise Unsolved("its model_output is not finite")
    closest: tuple[Form, Reading] | None = None
    ways = (None, *preconditionings(given.kind, given.sigma, given.exploding, given.data))
    for way in ways:
        for reading in _readings(given, way):
            solved = _fitted(reading, bar)
            if way is not None and not sums_to_one(solved.weights, bar):
                continue  # at some levels two ways differ by a factor on the network's output only
            if solved.error <= bar and (solved.settled or reading.complete):
                return named(_without_idle(solved, reading, bar), bar, name)
            if way is None and (closest is None or solved.error < closest[0].error):
                closest = solved, reading
    if closest is None:
        shapes = ", ".join(str(tuple(a.shape)) for a in given.answers)
        raise Unsolved(
            f"the network answers with {shapes} and the scheduler is given "
            f"{tuple(given.output.shape)}"
        )
    form, reading = closest
    for other in (scaled_by_frame, rescaled):
        if found := other(form, reading.blocks, reading.target, bar, name):
            return found
    for way in ways:
        for reading in _readings(given, way):
            for part in _parts(reading, given, bar):
                return named(part, bar, name)
    raise Unsolved(
        f"its formula is no sum of the {len(form.weights)} branches of its network "
        f"(relative residual {form.error:.1e})"
    )


def _readings(given: Given, way: Preconditioning | None) -> Iterator[Reading]:
    """Readings of the whole sample, simplest first."""
    output, x, answers = given.output, given.x, given.answers
    for frame in frames(output, x, list(answers)):
        m, seen = frame.rows(output), set[tuple[Any, ...]]()
        unit = target = m.detach().double()
        if way is not None:
            skip, out = way.factors(given.sigma)
            noisy = frame.rows(x).double()
            unit = way.x0(target, noisy, given.sigma) / out
            target = unit - (skip / out) * noisy
        parts: tuple[Part, Part] = ("leading", "trailing")
        for part in parts:
            rows = [rows_like(answer, m, part) for answer in answers]
            key = tuple(r is not None and (r.data_ptr(), r.stride()) for r in rows)
            if key in seen:
                continue
            seen.add(key)
            counts = tuple(0 if r is None else len(r) // len(m) for r in rows)
            for used in _used(counts):
                chosen = [r for r, n in zip(rows, used, strict=True) if r is not None and n]
                blocks = [b for r in chosen for b in r.split(len(m))]
                form = Form(frame, part, used, (), preconditioning=way)
                yield Reading(form, blocks, target, unit, used == counts)


def _used(counts: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Blocks per call: of one call with several, the last first, then of all calls."""
    if sum(counts) > max(counts) and sum(counts) > 2:
        for at in reversed(range(len(counts))):
            if 2 <= counts[at] <= MOST:
                yield tuple(n if k == at else 0 for k, n in enumerate(counts))
    if 1 <= sum(counts) <= MOST:
        yield counts


def _fitted(reading: Reading, bar: float) -> Form:
    """Least squares over the first block and the differences from it."""
    form, blocks = reading.form, reading.blocks
    first = blocks[0].detach().double().flatten()
    columns = [first, *(b.detach().double().flatten() - first for b in blocks[1:])]
    target, lengths = reading.target.flatten(), [_length(column) for column in columns]
    least = 1e-3 if bar == TOLERANCE_HALF else 1e-6
    if not lengths[0] and not target.any():
        return replace(form, weights=(1.0, *[0.0] * (len(blocks) - 1)), settled=len(blocks) == 1)
    kept = [k for k, length in enumerate(lengths) if length > least * lengths[0]]
    settled = len(kept) == len(columns)
    matrix = torch.stack([columns[k] for k in kept] or [first], 1)
    norms = target.new_tensor([max(lengths[k], 1e-300) for k in kept or [0]])
    basis, triangle = torch.linalg.qr(matrix / norms)
    pivots = triangle.diagonal().abs()
    if pivots.min() < least:
        settled = False
    found = torch.linalg.lstsq(triangle, (basis.T @ target)[:, None]).solution[:, 0] / norms
    weights = [0.0] * len(columns)
    for k, value in zip(kept or [0], found.tolist(), strict=True):
        weights[k] = value
    weights[0] -= sum(weights[1:])
    return replace(form, weights=tuple(weights), settled=settled, error=reading.error(weights))


def _length(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values))


def _without_idle(form: Form, reading: Reading, bar: float) -> Form:
    """Leave out branches of weight 0: the pipeline evaluates them for other ends (attention)."""
    least = IDLE * max(map(abs, form.weights))
    weights = tuple(0.0 if abs(w) < least else w for w in form.weights)
    if weights == form.weights:
        return form
    error = reading.error(weights)
    return replace(form, weights=weights, error=error) if error <= bar else form


def _parts(reading: Reading, given: Given, bar: float) -> Iterator[Form]:
    """Formulas of the first or last channels or frames; the rest is a branch's, or given.

    What a pipeline gives to its scheduler for frames that are given to it has a constant x0, which
    is checked in the next step.
    """
    target, count = reading.target, len(reading.blocks)
    for dim in range(1, target.ndim - 2):
        size = target.shape[dim]
        for first in (True, False) if size > 1 else ():
            singles = [reading.of(Region(dim, k, 1)) for k in range(size)]
            ordered = singles if first else singles[::-1]
            form = _fitted(ordered[0], bar)
            if form.error > bar or not form.settled or count < 2:
                continue
            fits = [one.error(form.weights) <= bar for one in ordered]
            length = fits.index(False) if False in fits else size
            region = Region(dim, 0 if first else size - length, length)
            found = _without_idle(_fitted(reading.of(region), bar), reading.of(region), bar)
            if length == size or found.error > bar or not sums_to_one(found.weights, bar):
                continue
            if sum(map(bool, found.weights)) < 2:
                continue
            sign = 1.0 if sum(found.weights) > 0 else -1.0
            rest = region.rest(target)
            copies = [relative(sign * region.rest(b), rest) <= bar for b in reading.blocks]
            if True in copies:
                yield replace(found, copied=copies.index(True))
            elif target.ndim == 5 and given.sigma > 0 and given.kind in ("x0", *SLOPES):
                yield found
