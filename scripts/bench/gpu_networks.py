"""Times of whole steps on a GPU, network included: what the kernels are worth end to end.

Networks have random weights in bfloat16 and the sizes of well-known models; a step is one
evaluation of the pair (cond, uncond) at batch 1, then guidance and sampler, on the Triton backend
("fused") or the reference. The two take turns, since they differ by less than a run varies.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from sampler_kernels import use_backend

from sampler.core.benchmark import BenchmarkStep, Case
from scripts.bench.meters import Meter
from scripts.bench.tables import Task

PAIRS = 30
CASES = (
    Case("CFG + DDIM", "cfg"),
    Case("APG + DPM-Solver++(2M)", "apg", "dpmpp_2m"),
)


@dataclass(frozen=True)
class Network:
    """A network by name: how to build it, and the shape of a latent.

    evaluate(module, x) gives the output at x [2, ...].
    """

    name: str
    shape: tuple[int, ...]
    build: Callable[[], torch.nn.Module]
    evaluate: Callable[[Any, torch.Tensor], torch.Tensor]


def sd15() -> torch.nn.Module:
    """The U-Net of Stable Diffusion 1.5."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return UNet2DConditionModel(cross_attention_dim=768)


def sdxl() -> torch.nn.Module:
    """The U-Net of Stable Diffusion XL."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    settings: dict[str, Any] = dict(  # annotated as tuples of one element
        transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20)
    )
    return UNet2DConditionModel(
        **settings,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def dit_s() -> torch.nn.Module:
    """DiT-S/2 (Peebles and Xie, 2022, arXiv:2212.09748, table 1)."""
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=6, attention_head_dim=64, num_layers=12, sample_size=32, patch_size=2
    )


def _unet(module: Any, x: torch.Tensor) -> torch.Tensor:
    text = x.new_zeros(len(x), 77, module.config.cross_attention_dim)
    extra = None
    if module.config.addition_embed_type:
        extra = {"text_embeds": x.new_zeros(len(x), 1280), "time_ids": x.new_ones(len(x), 6)}
    t = x.new_full((), 500.0, dtype=torch.float32)
    return module(x, t, text, added_cond_kwargs=extra, return_dict=False)[0]


def _dit(module: Any, x: torch.Tensor) -> torch.Tensor:
    t = x.new_full((len(x),), 500, dtype=torch.long)
    return module(x, t, class_labels=t, return_dict=False)[0]


NETWORKS = (
    Network("SD 1.5, 512²", (4, 64, 64), sd15, _unet),
    Network("SDXL, 1024²", (4, 128, 128), sdxl, _unet),
    Network("DiT-S/2, 256²", (4, 32, 32), dit_s, _dit),
)


def network_tasks(
    meter: Meter, networks: Sequence[Network] = NETWORKS, pairs: int = PAIRS
) -> Iterator[Task]:
    """The rows (case, network): milliseconds per step with and without fusion, called and in a
    graph; medians of `pairs` timings of each in turn."""
    for network in networks:
        for case in CASES:
            yield (case.name, network.name), partial(_measured, meter, network, case, pairs)


def _measured(meter: Meter, network: Network, case: Case, pairs: int) -> dict[str, Any]:
    with torch.device(meter.device):
        torch.manual_seed(0)
        module = network.build().to(torch.bfloat16).eval()
    whole = partial(_step, network, module, BenchmarkStep(case, (1, *network.shape), meter.device))
    try:
        with torch.no_grad():
            fused, eager = partial(_on, "triton", whole), partial(_on, "reference", whole)
            called = _in_turn(meter, fused, eager, pairs)
            graphs = _in_turn(meter, meter.captured(fused), meter.captured(eager), pairs)
    finally:
        meter.released()
    return {
        "case": case.name,
        "network": network.name,
        "parameters": sum(p.numel() for p in module.parameters()),
        "fused ms": round(called[0] / 1e3, 4),
        "reference ms": round(called[1] / 1e3, 4),
        "gain": f"{1 - called[0] / called[1]:.3%}",
        "fused in a graph ms": round(graphs[0] / 1e3, 4),
        "reference in a graph ms": round(graphs[1] / 1e3, 4),
        "gain in a graph": f"{1 - graphs[0] / graphs[1]:.3%}",
    }


def _step(network: Network, module: torch.nn.Module, step: BenchmarkStep) -> Any:
    x = torch.cat([step.x, step.x]).to(torch.bfloat16)
    step.c, step.u = network.evaluate(module, x).chunk(2)
    return step()


def _on(backend: str, fn: Callable[[], Any]) -> Any:
    with use_backend(backend):
        return fn()


def _in_turn(
    meter: Meter, a: Callable[[], Any], b: Callable[[], Any], pairs: int
) -> tuple[float, float]:
    """Median microseconds of two calls that take turns."""
    a()
    b()
    times = [(meter.microseconds(a), meter.microseconds(b)) for _ in range(pairs)]
    return statistics.median(t for t, _ in times), statistics.median(t for _, t in times)
