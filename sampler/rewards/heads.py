"""Small networks on top of encoders."""

from __future__ import annotations

from torch import Tensor, nn


class ScoreHead(nn.Module):
    """Five linear layers from an embedding to one score; without the dropout of training.

    The layout of the aesthetic predictor and of ImageReward: keys layers.{0,2,4,6,7}.
    """

    KEYS = (0, 2, 4, 6, 7)
    WIDTHS = (1024, 128, 64, 16, 1)

    def __init__(self, size: int) -> None:
        super().__init__()
        sizes = (size, *self.WIDTHS)
        self.layers = nn.ModuleDict(
            {str(k): nn.Linear(sizes[i], sizes[i + 1]) for i, k in enumerate(self.KEYS)}
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x[:, 0]
