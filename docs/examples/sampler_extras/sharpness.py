from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sharpness:
    """Sharpness of an image [3, H, W] in [0, 1]: the variance of its Laplacian.

    score = mean (d − mean d)²,   d = Y(up) + Y(down) + Y(left) + Y(right) − 4·Y,
    Y = 0.299·R + 0.587·G + 0.114·B,   over the pixels that have all four neighbours.
    """

    reference = "Pech-Pacheco et al. (2000), Diatom autofocusing in brightfield microscopy, LAPV"
    differentiable = True

    def __call__(self, images: Any, prompts: Any) -> Any:
        y = (images * images.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1)
        inner, across, down = y[:, 1:-1, 1:-1], y[:, 1:-1], y[..., 1:-1]
        laplacian = across[..., :-2] + across[..., 2:] + down[:, :-2] + down[:, 2:] - 4 * inner
        return laplacian.flatten(1).var(1, correction=0)
