"""Distils a text-to-image pipeline into a few-step consistency student, as an adapter.

    python scripts/distill_lcm.py --out runs/lcm --updates 2000
    sampler generate "a dog" --lora runs/lcm --sampler consistency --guidance none --steps 4

Latent consistency distillation (Luo et al., 2023, arXiv:2310.04378, algorithm 1) with the guidance
scale baked in, and no data: images of the teacher itself stand in for a training set.

    x_n = alpha_n·x0 + sigma_n·eps
    x'  = DDIM step of the guided teacher from level n to n + 1
    loss = mean sqrt(|f_theta(x_n, n) − f_ema(x', n + 1)|² + c²) − c,     f the estimate of x0

The last level has no noise: there the target is x' itself. Deviations: the scale is fixed instead
of an input of the network; the boundary factors c_skip, c_out are left out, as in the sampler
"consistency"; teacher and student are one network, with the adapter off and on.

The run resumes from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import sampler
from sampler import bundled
from sampler.binding import fingerprint
from sampler.finetune import checkpoint
from sampler.finetune.base import derived
from sampler.finetune.lora import Adapter, adapted, save_lora
from sampler.types import Cond, Level, Snapshot, Span

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "conv1", "conv2")
HUBER = 1e-3  # c, for latents of unit variance per element


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/lcm"))
    parser.add_argument("--model", help="folder; the bundled model by default")
    parser.add_argument("--prompts", type=Path, help="a text file; the bundled captions by default")
    parser.add_argument("--images", type=int, default=2048, help="of the teacher, to learn from")
    parser.add_argument("--updates", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--scale", type=float, default=3.0, help="guidance scale to bake in")
    parser.add_argument("--levels", type=int, default=50, help="of the teacher's grid")
    parser.add_argument("--steps", type=int, default=20, help="of the teacher's images")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    engine = sampler.load(options.model)
    if options.prompts is None:
        captions = [p.text for p in bundled.prompts(options.images)]
    else:
        captions = options.prompts.read_text(encoding="utf-8").split("\n")
        captions = [line for line in captions if line.strip()]
    distil(engine, captions, options)


def distil(engine: Any, captions: list[str], options: argparse.Namespace) -> None:
    """Trains the student and writes its adapter into --out."""
    texts = [captions[i % len(captions)] for i in range(options.images)]
    latents = teacher_latents(engine, texts, options)
    network = engine.pipeline.network
    name = fingerprint(network)
    with adapted(network, options.rank, options.rank, TARGETS, options.seed) as adapter:
        adam = torch.optim.Adam(adapter.parameters.values(), lr=options.lr)
        average, done = resumed(adapter, adam, options.out)
        for update in range(done, options.updates):
            for group in adam.param_groups:  # down to a tenth, linearly
                group["lr"] = options.lr * (1 - 0.9 * update / options.updates)
            loss = one_update(engine, adapter, average, texts, latents, update, options)
            adam.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(list(adapter.parameters.values()), 1.0)
            adam.step()
            for key, value in adapter.tensors().items():
                average[key].lerp_(value, 1 - options.ema)
            if (update + 1) % 100 == 0 or update + 1 == options.updates:
                print(json.dumps({"update": update + 1, "loss": float(loss.detach())}), flush=True)
                save(adapter, adam, average, update + 1, options.out)
        adapter.load(average)
        manifest = {"kind": "student", "base": name, "baked_guidance": options.scale}
        manifest |= {"sampler": "consistency", "updates": options.updates}
        save_lora(adapter, engine.pipeline.network_name, options.out, manifest)


def one_update(
    engine: Any,
    adapter: Adapter,
    average: dict[str, Tensor],
    texts: list[str],
    latents: Tensor,
    update: int,
    options: argparse.Namespace,
) -> Tensor:
    """The loss of one batch; rows, level and noise are functions of (seed, update)."""
    pipeline = engine.pipeline
    generator = torch.Generator().manual_seed(derived(options.seed, update, "batch"))
    rows = torch.randint(len(texts), (options.batch,), generator=generator).tolist()
    size = pipeline.size(None, None)
    grid = pipeline.grid(options.levels, size)
    n = int(torch.randint(options.levels, (1,), generator=generator))
    x0 = latents[rows].to(pipeline.device)
    noise = torch.randn(x0.shape, generator=generator).to(x0)
    x = grid[n].alpha * x0 + grid[n].sigma * noise
    rule = sampler.build("guidance", {"name": "cfg", "scale": options.scale})
    with torch.no_grad():
        cond = pipeline.encode([texts[r] for r in rows], [""] * len(rows), True, size)
        adapter.disable()
        guided = predicted(engine, x, grid, n, cond, rule)
        method = sampler.build("sampler", "ddim")
        x_next = sampler.settle(method.step(x, guided, Span(n, grid[n], grid[n + 1]), ()).mean)
        adapter.enable()
        target = x_next
        if n + 1 < options.levels:
            own = adapter.tensors()
            adapter.load(average)
            target = predicted(engine, x_next, grid, n + 1, cond, "none").x0.tensor()
            adapter.load(own)
    student = predicted(engine, x, grid, n, cond, "none").x0.tensor()
    return ((student - target).square() + HUBER**2).sqrt().mean() - HUBER


def predicted(
    engine: Any, x: Tensor, grid: tuple[Level, ...], n: int, cond: Cond, rule: Any
) -> Any:
    """The prediction at level n."""
    zeros = (0,) * len(x)
    built = sampler.build("guidance", rule)
    snapshot = Snapshot(n, x, (), built.start(cond), zeros, zeros)
    return engine.predict(snapshot, Span(n, grid[n], grid[n + 1]), cond, built)[0]


def teacher_latents(engine: Any, texts: list[str], options: argparse.Namespace) -> Tensor:
    """Latents [N, ...] of the teacher's own images; kept in --out."""
    path = options.out / "teacher.safetensors"
    if path.is_file():
        kept = load_file(path)["latents"]
        if len(kept) == len(texts):
            return kept
    result = engine.generate(
        texts,
        seeds=[derived(options.seed, i, "teacher") for i in range(len(texts))],
        steps=options.steps,
        sampler={"name": "ab", "order": 2},
        guidance={"name": "cfg", "scale": options.scale},
        batch_size=16,
        output="latent",
        progress=lambda done, total: print(json.dumps({"teacher": done, "of": total}), flush=True),
    )
    options.out.mkdir(parents=True, exist_ok=True)
    save_file({"latents": result.latents.cpu().contiguous()}, path)
    return result.latents.cpu()


def save(adapter: Adapter, adam: Any, average: dict[str, Tensor], update: int, out: Path) -> None:
    """A checkpoint: the adapter, its average, the optimiser."""
    tensors = {f"now.{k}": v for k, v in adapter.tensors().items()}
    tensors |= {f"ema.{k}": v for k, v in average.items()}
    kept = checkpoint.Checkpoint(update, tensors, checkpoint.optimizer_tensors(adam), {})
    checkpoint.save_checkpoint(out / "checkpoints", kept, 2)


def resumed(adapter: Adapter, adam: Any, out: Path) -> tuple[dict[str, Tensor], int]:
    """(average weights, updates done) of the newest checkpoint, or of the start."""
    found = checkpoint.load_newest(out / "checkpoints")
    if found is None:
        return adapter.tensors(), 0
    adapter.load({k: found.adapter[f"now.{k}"] for k in adapter.parameters})
    checkpoint.restore_optimizer(adam, found.optimizer)
    return {k: found.adapter[f"ema.{k}"] for k in adapter.parameters}, found.update


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
