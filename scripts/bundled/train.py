"""Train the bundled model from captioned sprites, one stage per call.

    python -m scripts.bundled.train classifier --data sprites.npz --out runs/bundled
    python -m scripts.bundled.train vae        --data sprites.npz --out runs/bundled
    python -m scripts.bundled.train unet       --data sprites.npz --out runs/bundled
    python -m scripts.bundled.train weak       --data sprites.npz --out runs/bundled
    python -m scripts.bundled.train sd3        --data sprites.npz --out runs/bundled
    python -m scripts.bundled.train report     --data sprites.npz --out runs/bundled

``--out/bundle`` gets the layout of ``sampler/bundled``; ``--init sampler/bundled/pipeline`` goes
on from the shipped weights. A killed call, repeated, continues from its last checkpoint; with an
``--images`` budget on a CPU it then gives the same losses bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from sampler.bundled import FOLDER
from sampler.bundled.classifier import load
from scripts.bundled.classifier_task import ClassifierTask, save_classifier, save_statistics
from scripts.bundled.emoji_data import EmojiData
from scripts.bundled.loop import Plan, save_pictures, train
from scripts.bundled.networks import (
    MAIN_WIDTHS,
    WEAK_WIDTHS,
    assembled,
    load_part,
    load_pipeline,
    new_scheduler,
    new_text_encoder,
    new_unet,
    new_vae,
    save_index,
    save_part,
)
from scripts.bundled.report import Settings, generate, report, write_report
from scripts.bundled.sd3_task import (
    RepeatedTokenAttention,
    Sd3Task,
    assembled_sd3,
    new_transformer,
)
from scripts.bundled.sd3_task import new_text_encoder as new_sd3_text_encoder
from scripts.bundled.tasks import Latents, UnetTask, VaeTask, grid_captions, latent_scale
from scripts.bundled.tokenizer import tokenizer_for


class Stage(str, Enum):
    """The stages, in the order in which a training from nothing runs them."""

    vae = "vae"
    classifier = "classifier"
    unet = "unet"
    weak = "weak"
    sd3 = "sd3"
    report = "report"


PLANS = {
    Stage.vae: Plan(2e-3, images=400_000, batch_size=32),
    Stage.classifier: Plan(2e-3, images=512_000, batch_size=64, weight_decay=0.05),
    Stage.unet: Plan(
        8e-4, 2_000_000, None, 64, weight_decay=0.01, warmup=150, hold=0.55, cosine=False
    ),
    Stage.weak: Plan(
        1e-3, 80_000, None, 64, weight_decay=0.01, warmup=150, hold=0.6, cosine=False, ema=0.995
    ),
    Stage.sd3: Plan(
        1e-3, 512_000, None, 64, weight_decay=0.01, warmup=150, hold=0.55, cosine=False
    ),
}


@dataclass(frozen=True)
class Job:
    """Inputs of every stage: data, folders, seed, device, number of cached latents."""

    data: EmojiData
    out: Path
    init: Path | None
    seed: int
    latents: int
    compiled: bool = False

    @property
    def pipeline(self) -> Path:
        """The pipeline folder being built."""
        return self.out / "bundle" / "pipeline"

    def part(self, kind: str, *, fresh: bool) -> Any:
        """Load a part: ``fresh`` parts from --init only, others from this run's bundle first."""
        places = [self.init] if fresh else [self.pipeline, self.init]
        for place in places:
            if place is not None and (place / kind).exists():
                return load_part(kind, place / kind, training=fresh).to(self.data.sprites.device)
        return None

    def needed(self, kind: str, stage: str) -> Any:
        """Load a frozen part, or say which stage makes it."""
        part = self.part(kind, fresh=False)
        if part is None:
            raise typer.BadParameter(f"no {kind} yet: run the {stage} stage first or give --init")
        return part.eval().requires_grad_(False)


def run_vae(job: Job, plan: Plan) -> None:
    """Train the autoencoder, measure the latents' scale, write ``vae/``."""
    torch.manual_seed(job.seed)
    vae = job.part("vae", fresh=True) or new_vae()
    trained: Any = train(VaeTask(job.data, vae, plan.batch_size, job.seed), plan, job.out / "vae")
    scale = latent_scale(trained["vae"], job.data, job.seed)
    trained["vae"].register_to_config(scaling_factor=scale)
    save_part(trained["vae"], job.pipeline / "vae")


def run_classifier(job: Job, plan: Plan, statistics: int) -> None:
    """Train the classifier; write it and the statistics of real composites."""
    task = ClassifierTask(job.data, plan.batch_size, job.seed)
    trained: Any = train(task, plan, job.out / "classifier")
    bundle = job.out / "bundle"
    save_classifier(trained["classifier"], job.data, bundle / "classifier")
    # The statistics belong to the rounded fp16 weights that are shipped.
    path = bundle / "statistics.safetensors"
    save_statistics(load(bundle / "classifier"), job.data, statistics, job.seed, path)


def run_unet(job: Job, plan: Plan, *, weak: bool) -> None:
    """Train the UNet with its text encoder, or the weaker sibling with a frozen one."""
    torch.manual_seed(job.seed)
    tokenizer = tokenizer_for(job.data, (job.init or FOLDER / "pipeline") / "tokenizer")
    vae = job.needed("vae", "vae")
    if weak:
        unet, text = new_unet(WEAK_WIDTHS), job.needed("text_encoder", "unet")
    else:
        unet = job.part("unet", fresh=True) or new_unet(MAIN_WIDTHS)
        text = job.part("text_encoder", fresh=True) or new_text_encoder(tokenizer)

    def draw(modules: nn.ModuleDict) -> Tensor:
        encoder = modules["text_encoder"] if "text_encoder" in modules else text
        pipeline = assembled(vae, encoder, tokenizer, modules["unet"], new_scheduler())
        return generate(pipeline, grid_captions(job.data), Settings(steps=10))

    if job.compiled:
        unet.compile()
    latents = Latents(job.data, vae, job.latents, job.seed, job.out / "latents.safetensors")
    task = UnetTask(
        latents, unet, text, tokenizer, plan.batch_size, job.seed, freeze_text=weak, draw=draw
    )
    trained: Any = train(task, plan, job.out / ("weak" if weak else "unet"))
    if weak:
        save_part(trained["unet"], job.out / "bundle" / "weak")
        return
    parts = {"unet": trained["unet"], "text_encoder": trained["text_encoder"], "vae": vae}
    for kind, part in (parts | {"tokenizer": tokenizer, "scheduler": new_scheduler()}).items():
        save_part(part, job.pipeline / kind)
    save_index(job.pipeline, assembled(**parts, tokenizer=tokenizer, scheduler=new_scheduler()))


def run_sd3(job: Job, plan: Plan) -> None:
    """Train the small SD3 towards the pipeline of ``--init``; write its own parts."""
    torch.manual_seed(job.seed)
    teacher = load_pipeline(job.init or FOLDER / "pipeline")
    tokenizer, vae = teacher.tokenizer, teacher.vae
    parts: dict[str, nn.Module] = {
        "transformer": new_transformer(),
        "text_encoder": new_sd3_text_encoder(tokenizer),
        "text_encoder_2": new_sd3_text_encoder(tokenizer),
    }
    parts["transformer"].set_attn_processor(RepeatedTokenAttention())  # pyright: ignore[reportCallIssue]

    def draw(modules: nn.ModuleDict) -> Tensor:
        plain = new_transformer().eval()
        plain.load_state_dict(modules["transformer"].state_dict())
        pipeline = assembled_sd3(dict(modules.items()) | {"transformer": plain}, vae, tokenizer)
        return generate(pipeline, grid_captions(job.data), Settings(steps=10))

    latents = Latents(job.data, vae, job.latents, job.seed, job.out / "latents.safetensors")  # pyright: ignore[reportArgumentType]
    task = Sd3Task(latents, parts, teacher, tokenizer, plan.batch_size, job.seed, draw=draw)
    trained = train(task, plan, job.out / "sd3")
    folder = job.out / "bundle" / "sd3"
    parts = dict(trained.items())
    whole = assembled_sd3(parts, vae, tokenizer)
    for kind in ("vae", "tokenizer", "tokenizer_2", "scheduler"):
        parts[kind] = whole.components[kind]
    for kind, part in parts.items():
        save_part(part, folder / kind)
    save_index(folder, whole)


def main(
    stage: Annotated[Stage, typer.Argument(help="What to train, or the final report.")],
    data: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="Sprite file (npz).")],
    out: Annotated[Path, typer.Option(help="Folder for states, logs, grids and the bundle.")],
    init: Annotated[Path | None, typer.Option(exists=True, help="Pipeline to start from.")] = None,
    images: Annotated[int | None, typer.Option(min=1, help="Budget in images seen.")] = None,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Budget in minutes.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images per step.")] = None,
    lr: Annotated[float | None, typer.Option(min=0, help="Peak learning rate.")] = None,
    hold: Annotated[float | None, typer.Option(min=0, max=0.99, help="Share at the peak.")] = None,
    checkpoint_steps: Annotated[int, typer.Option(min=1, help="Steps between states.")] = 500,
    latents: Annotated[int, typer.Option(min=64, help="Cached latents.")] = 65_536,
    statistics: Annotated[int, typer.Option(min=256, help="Real images measured.")] = 32_768,
    count: Annotated[int, typer.Option(min=16, help="Images of the report.")] = 512,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps of the report.")] = 20,
    bundle: Annotated[Path | None, typer.Option(exists=True, help="Bundle to report on.")] = None,
    of_sd3: Annotated[bool, typer.Option("--sd3", help="Report on the small SD3.")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the UNet.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads; 1 is fastest here.")] = 1,
) -> None:
    """Train one stage of the bundled model, or write the report."""
    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if stage is Stage.report:
        device = "cpu"  # The reported figures are those of float32 on a CPU.
    job = Job(EmojiData(data, device=device), out, init, seed, latents, compiled)
    if stage is Stage.report:
        figures, made = report(
            bundle or out / "bundle", job.data, count, Settings(steps), sd3=of_sd3
        )
        write_report(figures, out)
        save_pictures(made[:128], out / "contact_sheet.png")
        return
    given = {"images": images, "minutes": minutes, "batch_size": batch_size, "lr": lr, "hold": hold}
    plan = replace(PLANS[stage], checkpoint_steps=checkpoint_steps)
    if minutes is not None:
        plan = replace(plan, images=None)
    plan = replace(plan, **{key: value for key, value in given.items() if value is not None})
    if stage is Stage.vae:
        run_vae(job, plan)
    elif stage is Stage.classifier:
        run_classifier(job, plan, statistics)
    elif stage is Stage.sd3:
        run_sd3(job, plan)
    else:
        run_unet(job, plan, weak=stage is Stage.weak)


if __name__ == "__main__":
    typer.run(main)
