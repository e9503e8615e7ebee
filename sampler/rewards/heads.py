"""Small networks on top of encoders, and the files of their weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sampler.core.errors import ModelError


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


def read_weights(folder: str, name: str, others: Sequence[str] = ()) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file in a folder that also has `others`.

    Raises SamplerError (6) naming expected and missing files.
    """
    root = Path(folder)
    missing = [f for f in (name, *others) if not (root / f).is_file()]
    if missing:
        raise ModelError(
            f"{folder} lacks {', '.join(missing)}; expected files: {', '.join((name, *others))} "
            "(python -m scripts.rewards.convert writes them from the original checkpoints).",
        )
    try:
        return load_file(root / name)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{root / name} is not a safetensors file: {error}.") from None
