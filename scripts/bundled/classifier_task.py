"""The classifier stage of the bundled model: its loss, its figures and its files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from sampler.bundled.classifier import LAYERS, SmallClassifier, feature_statistics
from scripts.bundled.emoji_data import EmojiData, generator

HELD_OUT, STATISTICS = 1_000_003, 1_000_033
"""Added to the training seed, so that held-out composites and statistics use fresh draws."""

SEPARATE_STREAM = 7
"""Key of the augmentation's random stream, apart from the synthesiser's."""


class ClassifierTask:
    """Label-smoothed cross entropy on composites; a third noisy, a fifth slightly blurred.

    network: class of the classifier, built from the numbers of concepts, styles and backgrounds.
    autocast: compute in bfloat16, which is slower than float32 on a CPU without AMX.
    """

    def __init__(
        self,
        data: EmojiData,
        batch_size: int,
        seed: int,
        network: Callable[[int, int, int], nn.Module] = SmallClassifier,
        autocast: bool = True,
    ) -> None:
        torch.manual_seed(seed)
        self.autocast = autocast
        self.data, self.batch_size, self.seed = data, batch_size, seed
        self.device = data.sprites.device
        sizes = (len(data.concepts), len(data.styles), len(data.backgrounds))
        model = network(*sizes).to(self.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.modules = nn.ModuleDict({"classifier": model})

    def loss(self, step: int) -> Tensor:
        """Return 1 / 0.3 / 0.3 weighted cross entropies of batch ``step``."""
        batch = self.data.batch(self.batch_size, self.seed, step)
        images = self._augmented((batch.images + 1) / 2, step)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            logits = self.modules["classifier"](images)
        concept = F.cross_entropy(logits.concept.float(), batch.concept, label_smoothing=0.05)
        style = F.cross_entropy(logits.style.float(), batch.style)
        background = F.cross_entropy(logits.background.float(), batch.background)
        return concept + 0.3 * style + 0.3 * background

    def _augmented(self, images: Tensor, step: int) -> Tensor:
        """Noise of sigma up to 0.125 (half of the [-1, 1] figure) and a 3 x 3 binomial blur."""
        draw = generator(self.seed, step, SEPARATE_STREAM)
        chance = torch.rand(len(images), 3, generator=draw).to(images.device)[..., None, None, None]
        noise = torch.randn(images.shape, generator=draw).to(images.device)
        line = torch.tensor([0.25, 0.5, 0.25], device=images.device)
        kernel = torch.outer(line, line).expand(3, 1, 3, 3)
        padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
        images = torch.where(chance[:, 0] < 0.2, F.conv2d(padded, kernel, groups=3), images)
        images = images + noise * torch.where(chance[:, 1] < 1 / 3, 0.125 * chance[:, 2], 0.0)
        return images.contiguous(memory_format=torch.channels_last)

    def pictures(self, modules: nn.ModuleDict) -> Tensor | None:
        """Return None: a classifier draws nothing."""
        return None


@torch.no_grad()
def accuracy(
    model: nn.Module, data: EmojiData, images: int, seed: int, batch: int = 256
) -> dict[str, float]:
    """Return each head's accuracy on ``images`` fresh clean composites."""
    correct, seen = dict.fromkeys(("concept", "style", "background"), 0), 0
    for index in range(-(-images // batch)):
        drawn = data.batch(batch, seed + HELD_OUT, index)
        logits = model((drawn.images + 1) / 2)
        for head in correct:
            hits = getattr(logits, head).argmax(1) == getattr(drawn, head)
            correct[head] += int(hits.sum())
        seen += batch
    return {head: count / seen for head, count in correct.items()} | {"images": seen}


@torch.no_grad()
def composite_features(
    model: SmallClassifier, data: EmojiData, images: int, seed: int, batch: int = 256
) -> Tensor:
    """Return the features [N, 160] of fresh clean composites."""
    keys = range(-(-images // batch))
    drawn = (data.batch(batch, seed + STATISTICS, index) for index in keys)
    return torch.cat([model.features((item.images + 1) / 2) for item in drawn])[:images]


def save_classifier(model: SmallClassifier, data: EmojiData, folder: Path) -> None:
    """Write config.json and fp16 model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "image_size": 64,
        "layers": [list(layer) for layer in LAYERS],
        "concepts": data.concepts,
        "styles": data.styles,
        "backgrounds": data.backgrounds,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    state = {
        name: (value.half() if value.is_floating_point() else value).cpu().contiguous()
        for name, value in model.state_dict().items()
    }
    save_file(state, folder / "model.safetensors")


def save_statistics(
    model: SmallClassifier, data: EmojiData, images: int, seed: int, path: Path
) -> None:
    """Write mean [160] and covariance [160, 160] (float32) of real composites' features."""
    statistics = feature_statistics(composite_features(model, data, images, seed))
    save_file({name: value.float() for name, value in statistics._asdict().items()}, path)
