"""Diffusion-DPO: preferences of pairs of images, on the forward process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sampler.registry import register
from sampler.training.base import MicroBatchLoss
from sampler.training.batches import Batch
from sampler.training.matching.base import PairBase
from sampler.training.settings import Defaults

if TYPE_CHECKING:
    from sampler.training.session import Session


@register("trainer", "dpo")
@dataclass(frozen=True)
class DPO(PairBase):
    """Diffusion-DPO: learns which of two images of a prompt is preferred.

        e = mean((out − out*)²),   m = e_base − e   (the implicit margin)
        loss = −log sigmoid(beta/2·(m_chosen − m_rejected)) + anchor·e_chosen

    out is the network's output at x = alpha·x0 + sigma·eps and out* the exact one; both images of
    a pair have the same level and the same noise and are evaluated together; base is the model
    that was given. The pairs are those of the field data, or the best and the worst image of
    each group of samples by the reward; a group of equal rewards has none.

    beta: above 0; published recipes have 2000 to 5000. The strength of the pull to the base model.
    anchor: weight of the chosen image's own error, against a fall of both margins, which is the
        known failure: the loss compares the two only.
    data: a folder with metadata.jsonl, or a table (csv, tsv, jsonl, parquet), whose lines have
        prompt, chosen and rejected, names of image files of the trained size; it replaces prompts
        and reward. An update reads half as many pairs as `batch`.
    group_size: images per prompt, of which two are taken; not used with data.
    times: noise levels per pair and update; law, shift, low, high: of the levels, as in `nft`.
    minibatches, passes, train_rule, few_step: as in `nft`.

    Metrics: `margin_chosen` and `margin_rejected`, positive where the trained model denoises
    better than the base model; `accuracy`, the share of pairs in the right order; `flat_groups`,
    of those without preference, which count as 0 in the others.
    """

    reference: ClassVar[str] = (
        "Diffusion Model Alignment Using Direct Preference Optimization (Wallace et al., 2023), "
        "arXiv:2311.12908, eq. 14"
    )
    defaults: ClassVar[Defaults] = Defaults(
        steps=10,
        sampler={"name": "ab", "order": 2},
        lr=3e-4,
        weight_decay=1e-4,
        clip=1.0,
        rank=32,
        alpha=64,
    )

    def updates(self, session: Session, batch: Batch, state: Any) -> Iterator[MicroBatchLoss]:
        from sampler.training.matching.pairs import pair_updates

        return pair_updates(self, session, batch, state)
