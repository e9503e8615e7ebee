"""The share of guidance and sampler arithmetic in a step on a CPU: an upper bound on what fusing
it there can gain.

    python -m scripts.bench.share [--csv docs/figures/arithmetic_share.csv]

A step is APG with DPM-Solver++(2M) at batch 1, in one thread: one network evaluation of two rows,
and the arithmetic of the reference backend. Networks: the bundled one at its own latents and at
384², and a convolutional U-Net without attention, as cheap per element as networks come.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from sampler_kernels import use_backend

import sampler
from sampler.core.benchmark import APG, BenchmarkStep, Case, seconds
from scripts.bench.overhead import machine

CASE = Case("APG + DPM-Solver++(2M)", APG, "dpmpp_2m")
Network = Callable[[torch.Tensor], Any]


def bundled() -> Network:
    """The bundled network, with an arbitrary prompt embedding."""
    unet = sampler.load(device="cpu").pipeline.pipe.unet
    embedding = torch.randn(2, 16, unet.config.cross_attention_dim)
    return lambda x: unet(x, 500, encoder_hidden_states=embedding)


def convolutional() -> Network:
    """A random U-Net without attention, of 0.6 M parameters."""
    from diffusers.models.unets.unet_2d import UNet2DModel

    unet = UNet2DModel(
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        add_attention=False,
    )
    return lambda x: unet(x, 500)


CASES: tuple[tuple[str, Callable[[], Network], int], ...] = (
    ("bundled", bundled, 16),
    ("convolutional", convolutional, 384),
    ("bundled", bundled, 384),
)


def measure(name: str, build: Callable[[], Network], side: int) -> dict[str, Any]:
    """Milliseconds of the network and of the arithmetic in one step, and the latter's share."""
    network, x = build(), torch.randn(2, 4, side, side)
    step = BenchmarkStep(CASE, (1, 4, side, side), "cpu", torch.float32)
    with torch.no_grad(), use_backend("reference"):
        if side < 100:
            network(x)
        started = time.process_time()
        network(x)
        evaluation = time.process_time() - started
        arithmetic = seconds(step, 20)
    return {
        "network": name,
        "latents": f"4x{side}x{side}",
        "network ms": round(evaluation * 1e3, 2),
        "arithmetic ms": round(arithmetic * 1e3, 3),
        "share": f"{arithmetic / (evaluation + arithmetic):.2%}",
        **machine(),
    }


def rows() -> Iterator[dict[str, Any]]:
    for case in CASES:
        row = measure(*case)
        print(row, flush=True)
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--csv", type=Path, help="write the rows there")
    path = parser.parse_args().csv
    torch.set_num_threads(1)
    found = list(rows())
    if path:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(found[0]))
            writer.writeheader()
            writer.writerows(found)


if __name__ == "__main__":
    main()
