"""Measures of sets of images in a feature space: distances to a reference, and diversity."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from sampler import metrics
from sampler.bundled import classifier
from sampler.core.errors import UsageError
from sampler.core.images import read
from sampler.evaluation.scorers import digest_of

BUNDLED = "bundled"
SUBSETS = 8  # of the extrapolation
FEW = 10_000  # images below which distances of sets are biased noticeably


@dataclass(frozen=True)
class Extractor:
    """Features [B, d] of images: of the bundled classifier, or of a vision model's folder."""

    source: str = BUNDLED

    @property
    def label(self) -> str:
        """Short name, for tables."""
        return "bundled classifier" if self.source == BUNDLED else Path(self.source).name

    @property
    def network(self) -> nn.Module:
        """The network, loaded once."""
        return _bundled() if self.source == BUNDLED else _vision(self.source)

    def __call__(self, images: Tensor) -> Tensor:
        if self.source == BUNDLED:
            return _bundled().features(images)
        vision: Any = _vision(self.source)
        answer = vision.model(pixel_values=vision.prepare(images).to(vision.model.dtype))
        pooled = getattr(answer, "pooler_output", None)
        return (answer.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)).float()


@cache
def _bundled() -> classifier.SmallClassifier:
    return classifier.load()


@cache
def _vision(source: str) -> Any:
    from sampler.rewards.encoders import Vision

    return Vision("AutoModel", source, "float32", False)


@dataclass(frozen=True)
class SetMeasure:
    """A number of a set of features [n, d].

    by_prompt: of the images of each prompt, which makes an interval over prompts possible; else of
    all images. smallest: number of images below which it is undefined. reference: the folder or
    file that the images are compared with, None for that of the package.
    """

    label: str
    extractor: Extractor
    function: Callable[[Tensor], float]
    by_prompt: bool
    smallest: int = 2
    reference: str | None = None

    def check(self) -> None:
        """Load the network of the features. Raises SamplerError (6) for missing files."""
        _ = self.extractor.network

    def fingerprint(self) -> str:
        """Return a hash of the measure, the network of its features and its reference."""
        digest = hashlib.sha256()
        for path in () if self.reference is None else files_of(self.reference):
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest_of(f"{self.label} {digest.hexdigest()}", self.extractor.network)


def mean_distance(features: Tensor) -> float:
    """Mean Euclidean distance of the pairs of features [n, d]."""
    return float(torch.pdist(features.double()).mean())


def diversity(name: str, source: str = BUNDLED) -> SetMeasure:
    """Diversity of the images of a prompt.

    diversity: mean pairwise distance of their features; vendi: effective number of distinct images.
    """
    extractor = Extractor(source)
    function = mean_distance if name == "diversity" else metrics.vendi_score
    return SetMeasure(f"{name}({extractor.label})", extractor, function, True)


def distance(name: str, source: str = BUNDLED, reference: str | None = None) -> SetMeasure:
    """Distance of all images to a reference in features.

    frechet: of Gaussians; fd_inf: the same, extrapolated to infinitely many images; kernel: cubic
    maximum mean discrepancy. reference: a folder of images, or a safetensors file with mean and
    covariance; by default real composites of the bundled model's data.
    Raises UsageError for a reference that does not fit.
    """
    extractor = Extractor(source)
    if reference is None and (source != BUNDLED or name == "kernel"):
        raise UsageError(
            f"{name} needs reference=FOLDER of images"
            + ("." if name == "kernel" else ", or a file with mean and covariance.")
        )
    if reference is not None:
        _check_reference(name, reference)
    label = f"{name}({extractor.label})"
    if name == "kernel":
        return SetMeasure(
            label,
            extractor,
            lambda found: metrics.kernel_distance(found, _of_folder(str(reference), extractor)),
            False,
            reference=reference,
        )
    extrapolated = name == "fd_inf"

    def function(found: Tensor) -> float:
        gaussian = _gaussian(reference, extractor)
        if gaussian.mean.shape != found.shape[1:]:
            raise UsageError(
                f"reference={reference} has {len(gaussian.mean)} features, and those of the "
                f"{extractor.label} are {found.shape[1]}."
            )
        return (extrapolate if extrapolated else _frechet)(found, gaussian)

    smallest = 2 * SUBSETS if extrapolated else 2
    return SetMeasure(label, extractor, function, False, smallest, reference)


def _frechet(features: Tensor, reference: classifier.Statistics) -> float:
    return classifier.frechet_distance(*classifier.feature_statistics(features), *reference)


def extrapolate(features: Tensor, reference: classifier.Statistics) -> float:
    """Fréchet distance in the limit of infinitely many images.

    The distance of n images is linear in 1/n to first order: a line through the distances of 8
    random subsets of n/2 to n images, at 1/n = 0. Subsets are a function of n.
    Source: Effectively Unbiased FID and Inception Score (Chong & Forsyth, 2019), arXiv:1911.07023.
    """
    n = len(features)
    sizes = np.linspace(n // 2, n, SUBSETS).astype(int)
    draw = np.random.default_rng([n])
    found = [_frechet(features[draw.permutation(n)[:size]], reference) for size in sizes]
    return float(np.polyfit(1 / sizes, found, 1)[1])


@cache
def _gaussian(reference: str | None, extractor: Extractor) -> classifier.Statistics:
    if reference is None:
        return classifier.reference_statistics()
    path = Path(reference).expanduser()
    if path.is_dir():
        return classifier.feature_statistics(_of_folder(reference, extractor))
    return _of_file(path)


def _check_reference(name: str, reference: str) -> None:
    """Raise UsageError for anything but a folder of images, or, for Gaussians, statistics."""
    path = Path(reference).expanduser()
    if path.is_dir():
        if len(files_of(reference)) < 2:
            raise UsageError(f"reference={reference} must be a folder of at least 2 images.")
    elif not path.exists():
        raise UsageError(f"reference={reference} does not exist.")
    elif name == "kernel":
        raise UsageError(f"kernel needs a folder of images, and reference={reference} is a file.")
    else:
        _of_file(path)


def _of_file(path: Path) -> classifier.Statistics:
    try:
        return classifier.reference_statistics(path)
    except (SafetensorError, KeyError, OSError):
        raise UsageError(
            f"reference={path} must be a safetensors file with mean and covariance, or a folder of "
            "images."
        ) from None


@cache
def _of_folder(reference: str, extractor: Extractor) -> Tensor:
    """Features of all images below a folder."""
    with torch.no_grad():
        return torch.cat([extractor(read(path, on_white=True)) for path in files_of(reference)])


def files_of(reference: str) -> list[Path]:
    """Return the images below a folder in the order of their names, or the file itself."""
    place, endings = Path(reference).expanduser(), (".png", ".jpg", ".jpeg", ".webp")
    if place.is_file():
        return [place]
    return sorted(p for p in place.rglob("*") if p.suffix.lower() in endings)


def finite(value: float) -> float | None:
    """The value, or None where it is not finite."""
    return value if math.isfinite(value) else None


def by_cluster(
    measure: SetMeasure, clusters: Sequence[str], features: Tensor
) -> tuple[list[str], list[float]]:
    """Values of a measure of each prompt that has enough images: (prompts, values)."""
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(clusters):
        rows.setdefault(name, []).append(row)
    chosen = {k: r for k, r in sorted(rows.items()) if len(r) >= measure.smallest}
    return [*chosen], [measure.function(features[r]) for r in chosen.values()]
