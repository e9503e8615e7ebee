"""Previews: the predicted clean images of a run, decoded while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from sampler_kernels import settle

from sampler.core.batch import to_output
from sampler.engine import Engine
from sampler.types import Prediction, Snapshot, Span

PREVIEW_SECONDS = 0.4  # minimum between two previews
PREVIEW_SHARE = 4  # minimum ratio of sampling time to preview time
MAX_PREVIEWS = 4  # images decoded per preview


@dataclass(frozen=True)
class Preview:
    """Predicted clean images of the first samples of a batch after `step` of `steps`.

    done: number of finished images, of `total`.
    """

    images: Sequence[Image.Image]
    step: int
    steps: int
    done: int
    total: int


class PreviewEngine(Engine):
    """An engine that reports its guided predictions, at most as often as the constants above."""

    def preview(
        self, on_preview: Callable[[Preview], None], done: Callable[[], int], total: int
    ) -> PreviewEngine:
        """Report to on_preview; done: number of finished images, of `total`."""
        self._on_preview, self._done, self._total = on_preview, done, total
        self.spent, self._next = 0.0, 0.0
        return self

    def predict(
        self, snapshot: Snapshot, span: Span, cond: Any = None, guidance: Any = None
    ) -> tuple[Prediction, Any, tuple[int, ...]]:
        pred, state, nfe = super().predict(snapshot, span, cond, guidance)
        began = time.monotonic()
        if began >= self._next and span.index + 1 < span.total:
            with torch.no_grad():
                x0 = settle(pred.x0)[:MAX_PREVIEWS]
                images = to_output(self.pipeline.decode(x0).cpu().nan_to_num(0.5), "pil")
            done = self._done()
            self._on_preview(Preview(images, span.index + 1, span.total, done, self._total))
            took = time.monotonic() - began
            self.spent += took
            self._next = began + took + max(PREVIEW_SECONDS, PREVIEW_SHARE * took)
        return pred, state, nfe
