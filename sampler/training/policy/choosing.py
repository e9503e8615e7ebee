"""Updates of a policy trainer that chooses among the images of a group, or among prompts."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from sampler_kernels import map_tree
from torch import Tensor

from sampler.training.base import MicroBatchLoss
from sampler.training.batches import Batch, micro_batches, split
from sampler.training.online import OnlineMethod, collected, online_updates, step_losses
from sampler.training.policy.base import PolicyBase
from sampler.training.policy.rollout import Action, Trajectory
from sampler.training.policy.selection import State, flat_groups, kept_images, learned, widest
from sampler.training.session import Session
from sampler.types import Snapshot


def policy_updates(
    trainer: PolicyBase, method: OnlineMethod[Any], batch: Batch, state: Any
) -> Iterator[MicroBatchLoss]:
    """Yield the losses of a method on a batch, with the choices of its trainer."""
    if trainer.chooses:
        return _choosing(trainer, method, batch, state)
    return online_updates(method, batch, state)


def _choosing(
    trainer: PolicyBase, method: OnlineMethod[Any], batch: Batch, state: State
) -> Iterator[MicroBatchLoss]:
    """Collect and score a batch, then yield the losses of the images that are kept.

    state: {"own": of the method, "spread": running mean of the groups' deviations or None,
    "hits": {prompt: [a, b]}, "recent": rewards}.
    """
    session = method.session
    found = collected(session, batch, method.steps, partial(method.collect, batch))
    weights, own = method.weigh(batch, found, state["own"])
    after, metrics = {**state, "own": own}, dict(found.metrics)
    steps, counts = found.steps, None
    if trainer.select == "spread":
        groups = micro_batches(range(len(batch.prompts)), trainer.images_per_prompt)
        number = kept_images(trainer.keep, trainer.images_per_prompt, batch.progress)
        flat, after["spread"] = flat_groups(groups, found.rewards, state["spread"])
        kept = {
            row
            for group, drop in zip(groups, flat, strict=True)
            if not drop
            for row in widest(group, weights.advantage, number)
        }
        steps = [[p for part in step if (p := _part(session, batch, part, kept))] for step in steps]
        counts = _counts(batch, method.steps, kept)
        metrics |= {"kept": len(kept) / len(batch.prompts), "flat_groups": sum(flat) / len(flat)}
    if trainer.prompts == "vade":
        after |= learned(state, batch.groups, found.rewards)

    def losses(part: Any) -> Iterator[tuple[Tensor | None, dict[str, Any]]]:
        return method.losses(batch, part, weights)

    yield from step_losses(batch, method.passes, steps, losses, metrics, after, counts)
    method.after(after)


def _counts(batch: Batch, steps: int, kept: set[int]) -> list[int]:
    """Return the number of kept samples of each optimiser step, over all processes."""
    found = [0] * steps
    for rank in range(batch.world):
        rows = range(rank, len(batch.prompts), batch.world)
        for step, part in enumerate(split(rows, steps)):
            found[step] += sum(row in kept for row in part)
    return found


def _part(session: Session, batch: Batch, part: Trajectory, kept: set[int]) -> Trajectory | None:
    """Return a trajectory with the kept samples alone; the run is begun again for them."""
    places = [i for i, row in enumerate(part.rows) if row in kept]
    if not places or len(places) == len(part.rows):
        return part if places else None
    rows = [part.rows[i] for i in places]

    def take(leaf: Any) -> Any:
        return leaf[places] if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) else leaf

    def rows_of(snapshot: Snapshot) -> Snapshot:
        cut: Snapshot = map_tree(take, snapshot)
        seeds, nfe = ([values[i] for i in places] for values in (snapshot.seeds, snapshot.nfe))
        return cut._replace(seeds=tuple(seeds), nfe=tuple(nfe))

    with torch.no_grad():
        run = session.begin(batch, rows)
    return Trajectory(
        rows=rows,
        run=run._replace(levels=part.run.levels),
        x0=take(part.x0),
        reward=part.reward[places],
        parts={name: values[places] for name, values in part.parts.items()},
        nfe=part.nfe,
        actions=[Action(rows_of(a.before), take(a.after), take(a.log_prob)) for a in part.actions],
        final=rows_of(part.final),
    )
