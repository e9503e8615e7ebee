"""Distil the bundled model into a few-step latent consistency model that takes the scale as input.

    python -m scripts.bundled.distill_lcm train  --data sprites.npz --out runs/lcm
    python -m scripts.bundled.distill_lcm pack   --out runs/lcm
    python -m scripts.bundled.distill_lcm report --out runs/lcm

Latent consistency distillation (Luo et al., 2023, arXiv:2310.04378, algorithm 1). Levels
n = 0 .. N − 1, noisiest first, at t = (N − n)·1000/N − 1; level N is clean. Per row a level n and a
guidance scale w are drawn, x_n = alpha·x0 + sigma·eps for a training image x0, and

    x'   = DDIM step from level n to n + 1 of the teacher guided with w
    e    = (f(x_n, n, w) − stop(f(x', n + 1, w)))/sigma_n
    loss = mean sqrt(e² + c²) − c

with f the network's estimate of x0 (at level N: x' itself). The division makes e an error of the
network's output (v) at every level. Without it low levels, where x0 depends little on the output,
are learned badly, and every visit of them damages the image; consistency training gives low levels
more weight for the same reason (Song & Dhariwal, 2023, arXiv:2310.14189, section 3.4). Deviations
from the paper: the target network is the student itself instead of a moving average (the same,
section 3.2), and an average serves as the result; c_skip and c_out are left out of the loss (at the
lowest level, t = 124, c_skip is 2e-7).

`train` resumes from its last checkpoint after a kill; losses are the same bit for bit on a CPU.
`pack` writes the student's folder as in `sampler/bundled/lcm`; `report` measures it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sampler
from sampler.bundled import FOLDER, classifier, prompts
from sampler.bundled.measures import measure
from sampler.models.difference import load_difference, packed
from sampler.models.few_step import pipeline
from sampler.models.student_files import WEIGHTS
from sampler.pipelines.stable_diffusion import scale_embedding
from scripts.bundled.emoji_data import EmojiData, generator
from scripts.bundled.loop import Plan, save_pictures, train
from scripts.bundled.networks import load_pipeline, plain_attention
from scripts.bundled.tasks import Latents

LEVELS = 8
SCALES = (1.0, 5.0)
EMBEDDING = 256  # the size of LCM_Dreamshaper_v7's
HUBER = 1e-3  # c, for latents of unit variance

app = typer.Typer(add_completion=False)


def with_scale_input(teacher: Any) -> Any:
    """Copy a UNet and add a guidance embedding with zero weight."""
    student = type(teacher).from_config({**teacher.config, "time_cond_proj_dim": EMBEDDING})
    missing = student.load_state_dict(teacher.state_dict(), strict=False).missing_keys
    assert missing == ["time_embedding.cond_proj.weight"], missing
    nn.init.zeros_(student.time_embedding.cond_proj.weight)
    return student


class ConsistencyTask:
    """Consistency of a student with a guided teacher; see the module's docstring."""

    def __init__(
        self, latents: Latents, pipe: Any, batch_size: int, seed: int, init: Path | None = None
    ) -> None:
        self.latents, self.pipe, self.batch_size, self.seed = latents, pipe, batch_size, seed
        self.teacher = pipe.unet.eval().requires_grad_(False)
        student = with_scale_input(self.teacher)
        if init is not None:
            load_difference(student, init / WEIGHTS, self.teacher)
        plain_attention(student)
        self.modules = nn.ModuleDict({"unet": student})
        bars = pipe.scheduler.alphas_cumprod
        times = [(LEVELS - n) * 1000 // LEVELS - 1 for n in range(LEVELS)]
        self.times = torch.tensor([*times, 0])
        self.alpha_bar = torch.cat([bars[times], torch.ones(1)])

    def context(self, captions: list[str]) -> Tensor:
        """The text encoder's states [B, 16, D]."""
        encoded = self.pipe.tokenizer(
            captions, padding="max_length", truncation=True, max_length=16, return_tensors="pt"
        )
        return self.pipe.text_encoder(encoded["input_ids"])[0]

    def level(self, n: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) [B, 1, 1, 1] of levels n [B]."""
        bar = self.alpha_bar[n][:, None, None, None]
        return bar.sqrt(), (1 - bar).sqrt()

    def estimate(self, x: Tensor, n: Tensor, context: Tensor, embedded: Tensor) -> Tensor:
        """The student's x0 at levels n."""
        alpha, sigma = self.level(n)
        with torch.autocast("cpu", torch.bfloat16):
            v = self.modules["unet"](x, self.times[n], context, timestep_cond=embedded).sample
        return alpha * x - sigma * v.float()

    @torch.no_grad()
    def taught(self, x: Tensor, n: Tensor, context: Tensor, scale: Tensor) -> Tensor:
        """The guided teacher's DDIM step from levels n to n + 1."""
        empty = self.context([""]).expand_as(context)
        twice = (torch.cat([x, x]), self.times[n].repeat(2), torch.cat([empty, context]))
        with torch.autocast("cpu", torch.bfloat16):
            uncond, cond = self.teacher(*twice).sample.float().chunk(2)
        v = uncond + scale[:, None, None, None] * (cond - uncond)
        alpha, sigma = self.level(n)
        alpha_next, sigma_next = self.level(n + 1)
        return alpha_next * (alpha * x - sigma * v) + sigma_next * (sigma * x + alpha * v)

    def loss(self, step: int) -> Tensor:
        """The loss of batch `step`; random through (seed, step) only."""
        clean, captions = self.latents.batch(self.batch_size, self.seed, step)
        draw = generator(self.seed, step, 1)
        n = torch.randint(LEVELS, (len(clean),), generator=draw)
        scale = SCALES[0] + (SCALES[1] - SCALES[0]) * torch.rand(len(clean), generator=draw)
        alpha, sigma = self.level(n)
        x = alpha * clean + sigma * torch.randn(clean.shape, generator=draw)
        embedded = scale_embedding(scale, EMBEDDING)
        with torch.no_grad():
            context = self.context(captions)
            x_next = self.taught(x, n, context, scale)
            target = self.estimate(x_next, n + 1, context, embedded)
        error = (self.estimate(x, n, context, embedded) - target) / sigma
        return ((error.square() + HUBER**2).sqrt() - HUBER).mean()

    @torch.no_grad()
    def pictures(self, modules: nn.ModuleDict) -> Tensor:
        """16 prompts at scale 3 in 1, 2 and 4 steps, one row each."""
        listed = [p.text for p in prompts(128)][::8]
        context, embedded = self.context(listed), scale_embedding(torch.full((16,), 3.0), EMBEDDING)
        made = []
        for steps in (1, 2, 4):
            draw = generator(0)
            x = torch.randn(16, 4, 16, 16, generator=draw)
            for k in range(steps):
                n, after = (torch.full((16,), i * LEVELS // steps) for i in (k, k + 1))
                alpha, sigma = self.level(n)
                v = modules["unet"](x, self.times[n], context, timestep_cond=embedded).sample
                alpha_next, sigma_next = self.level(after)
                noise = torch.randn(x.shape, generator=draw)
                x = alpha_next * (alpha * x - sigma * v) + sigma_next * noise
            made.append(self.pipe.vae.decode(x / self.pipe.vae.config.scaling_factor).sample)
        return torch.cat(made) / 2 + 0.5


@app.command("train")
def train_student(
    data: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="Sprite file (npz).")],
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/lcm"),
    teacher: Annotated[Path, typer.Option(help="Pipeline folder.")] = FOLDER / "pipeline",
    init: Annotated[Path | None, typer.Option(help="Folder of a student to begin with.")] = None,
    images: Annotated[int, typer.Option(min=1, help="Budget in images seen.")] = 64_000,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    lr: Annotated[float, typer.Option(min=0)] = 4e-4,
    latents: Annotated[int, typer.Option(min=64, help="Cached latents.")] = 16_384,
    checkpoint_steps: Annotated[int, typer.Option(min=1)] = 100,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile both networks.")] = False,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Train, resuming an interrupted run."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    pipe: Any = load_pipeline(teacher)
    pipe.vae.requires_grad_(False)
    pipe.text_encoder.requires_grad_(False)
    cache = Latents(EmojiData(data), pipe.vae, latents, seed, out / "latents.safetensors")
    task = ConsistencyTask(cache, pipe, batch_size, seed, init)
    if compiled:
        task.teacher.compile()
        task.modules["unet"].compile()
    plan = Plan(
        lr, images, None, batch_size, weight_decay=0.0, warmup=50, hold=0.5, cosine=False,
        ema=0.995, checkpoint_steps=checkpoint_steps,
    )  # fmt: skip
    student = train(task, plan, out)["unet"]
    save_file(student.state_dict(), out / "student.safetensors")
    about = {"images": images, "seed": seed, "lr": lr, "batch_size": batch_size}
    (out / "trained.json").write_text(json.dumps(about) + "\n", encoding="utf-8")


@app.command("pack")
def pack(
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/lcm"),
    teacher: Annotated[Path, typer.Option(help="Pipeline folder.")] = FOLDER / "pipeline",
) -> None:
    """Write the student's folder, OUT/lcm."""
    folder = out / "lcm"
    folder.mkdir(parents=True, exist_ok=True)
    before = load_pipeline(teacher).unet.state_dict()
    stored = packed(load_file(out / "student.safetensors"), before)
    save_file(stored, folder / WEIGHTS, {"format": "pt"})
    config: dict[str, Any] = {
        "time_cond_proj_dim": EMBEDDING,
        "original_inference_steps": LEVELS,
        "scales": SCALES,
        "trained": json.loads((out / "trained.json").read_text(encoding="utf-8")),
    }
    text = json.dumps(config, indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


@app.command("report")
def report(
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/lcm"),
    student: Annotated[Path | None, typer.Option(help="Its folder; OUT/lcm by default.")] = None,
    images: Annotated[int, typer.Option(min=2, help="Prompts, each from its own seed.")] = 256,
    scale: Annotated[float, typer.Option(min=0)] = 3.0,
) -> None:
    """Measure the student at 1, 2, 4 and 8 steps; write OUT/report.json and a sheet of images."""
    torch.set_num_threads(1)
    engine = sampler.load(pipeline(load_pipeline(), student or out / "lcm"))
    listed, model = prompts(images), classifier.load()
    figures, sheets = {}, []
    for steps in (1, 2, 4, 8):
        made = engine.generate(
            [p.text for p in listed], seeds=list(range(images)), steps=steps, batch_size=32,
            guidance={"name": "embedded", "scale": scale}, output="tensor",
        ).images  # fmt: skip
        figures[steps] = measure(model, made, listed, classifier.reference_statistics())
        sheets.append(made[:128:8])
        print(json.dumps({"steps": steps, **figures[steps]}), flush=True)
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"scale": scale, "steps": figures}, indent=1) + "\n"
    (out / "report.json").write_text(text, encoding="utf-8")
    save_pictures(torch.cat(sheets), out / "sheet.png")


if __name__ == "__main__":
    app()
