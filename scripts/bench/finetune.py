"""AlignProp's update against TRL 0.12.2's, and against the bare network: CPU time and peak memory.

    python -m scripts.bench.finetune prepare --work runs/bench_finetune
    OMP_NUM_THREADS=1 python -m scripts.bench.finetune time   --work runs/bench_finetune
    OMP_NUM_THREADS=1 python -m scripts.bench.finetune memory --work runs/bench_finetune

`prepare` builds an environment of its own with the versions below, and in it a random Stable
Diffusion pipeline of 1 M parameters that all sides load. `time` runs three processes by turns, an
update each: ours, TRL's, and "bare": the same evaluations of text encoder, UNet and decoder, the
backward pass, and nothing else. `memory` is the growth of the resident set during an update at
K = T = 20, median of three after a first one, each side in a process of its own. 20 steps,
guidance 5, eta 1, LoRA of rank 4, float32.

--figures gets finetune_bench.csv: one line per measure, with the machine.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

VERSIONS = (
    "torch==2.13.0", "trl==0.12.2", "diffusers==0.31.0", "transformers==4.46.3",
    "accelerate==1.1.1", "peft==0.13.2", "numpy==1.26.4",
)  # fmt: skip
STEPS, SCALE = 20, 5.0
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
SIDES = ("ours", "trl", "bare")


def main() -> None:
    """The command line; "side" is what the worker processes run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("task", choices=["prepare", "time", "memory", "pipeline", "side"])
    parser.add_argument("--work", type=Path, default=Path("runs/bench_finetune"))
    parser.add_argument("--figures", type=Path, default=Path("docs/figures"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--k", type=int, default=1)
    parser.add_argument("--batch", type=int, default=2, help="images per update")
    parser.add_argument("--plain", action="store_true", help="without checkpointing")
    options = parser.parse_args()
    if options.task == "prepare":
        prepare(options.work)
    elif options.task == "pipeline":
        make_pipeline(options.work / "pipeline")
    elif options.task == "side":
        side(options)
    elif options.task == "time":
        record(options.figures, timed(options))
    else:
        record(options.figures, remembered(options))


def prepare(work: Path) -> None:
    """Create the second environment and the pipeline, keeping existing ones."""
    python = work / "trl" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(work / "trl")], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "-q", *VERSIONS], check=True)
    command = [str(python), __file__, "pipeline", "--work", str(work)]
    subprocess.run(command, check=True)


def make_pipeline(folder: Path) -> None:
    """A random Stable Diffusion of 64 x 64 pixels, in the files of the older libraries."""
    import torch
    from diffusers import (
        AutoencoderKL,  # pyright: ignore[reportPrivateImportUsage]
        DDIMScheduler,  # pyright: ignore[reportPrivateImportUsage]
        StableDiffusionPipeline,  # pyright: ignore[reportPrivateImportUsage]
        UNet2DConditionModel,  # pyright: ignore[reportPrivateImportUsage]
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    words_at = folder.parent / "words"
    words_at.mkdir(parents=True, exist_ok=True)
    letters = [chr(c) for c in range(33, 127)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(c + "</w>" for c in letters)]
    (words_at / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (words_at / "merges.txt").write_text("#version: 0.2\n")
    tokenizer: Any = CLIPTokenizer(
        str(words_at / "vocab.json"), str(words_at / "merges.txt"), model_max_length=16
    )
    text: Any = CLIPTextConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=16, bos_token_id=0, eos_token_id=1,
        pad_token_id=1,
    )  # fmt: skip
    unet: Any = {
        "sample_size": 32, "block_out_channels": (32, 64), "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 64, "attention_head_dim": 4, "norm_num_groups": 8,
    }  # fmt: skip
    vae: Any = {
        "block_out_channels": (16, 32), "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2, "latent_channels": 4, "norm_num_groups": 8,
        "sample_size": 64,
    }  # fmt: skip
    scheduler: Any = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
        clip_sample=False, set_alpha_to_one=False,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=AutoencoderKL(**vae),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(**unet),
        scheduler=scheduler,
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    ).save_pretrained(folder)


def brightness(images: Any, *_: Any) -> Any:
    """The reward of all sides: the mean of the pixels."""
    return images.mean((1, 2, 3))


def side(options: argparse.Namespace) -> None:
    """One worker: an update for every line of standard input, and its cost as a line of JSON."""
    import torch

    torch.set_num_threads(1)
    build = {"ours": ours, "trl": theirs, "bare": bare}[options.sides[0]]
    made = build(options.work, options.k, options.batch, not options.plain)
    sys.stdin.readline()
    while True:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what was freed is given back, so that growth is seen
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak
        before, spent = _memory("VmRSS"), time.process_time()
        made()
        cost = {"seconds": time.process_time() - spent, "mib": _memory("VmHWM") - before}
        print(json.dumps(cost), flush=True)
        if not sys.stdin.readline():
            return


def ours(work: Path, k: int, count: int, checkpointing: bool) -> Callable[[], None]:
    """`sampler.finetune`'s own update, with its batch, noise, metrics, clipping and optimiser."""
    import torch
    from accelerate import Accelerator

    import sampler
    from sampler.models.trainable_lora import adapted
    from sampler.rewards.base import RewardBase
    from sampler.training import batches, optimise
    from sampler.training.session import Session

    class Brightness(RewardBase):
        """The reward of both sides."""

        def __call__(self, images: Any, prompts: Any) -> Any:
            return brightness(images)

    engine = sampler.load(work / "pipeline", device="cpu")
    rule = {"name": "cfg", "scale": SCALE}
    method = sampler.build("sampler", {"name": "ddim", "eta": 1.0})
    spec = {"name": "alignprop", "truncation": "fixed", "k": k, "checkpointing": checkpointing}
    trainer = sampler.build("trainer", spec)
    holder = adapted(engine.pipeline.network, 4, 4, TARGETS, 0)
    adapter = holder.__enter__()
    session = Session(
        engine, Brightness(), method, sampler.build("guidance", rule), STEPS, (64, 64), count,
        trainable=adapter,
    )  # fmt: skip
    adam = torch.optim.AdamW(adapter.parameters.values(), lr=1e-3, weight_decay=1e-4)
    optimiser = optimise.Optimiser(adapter, adam, 1.0, Accelerator(cpu=True))
    done = [holder]  # keeps the adapter on

    def update() -> None:
        batch = batches.batch(["a fox", "a dog"], count, len(done), 0)
        optimise.run_update(trainer, session, batch, None, optimiser, "no")
        done.append(holder)

    return update


def theirs(work: Path, k: int, count: int, checkpointing: bool) -> Callable[[], None]:
    """AlignPropTrainer.step of TRL."""
    import functools

    from trl import (  # pyright: ignore[reportMissingImports]
        AlignPropConfig,
        AlignPropTrainer,
        DefaultDDPOStableDiffusionPipeline,
    )

    pipeline = DefaultDDPOStableDiffusionPipeline(str(work / "pipeline"), use_lora=True)
    plain = functools.partial(pipeline.rgb_with_grad, gradient_checkpoint=checkpointing)
    pipeline.rgb_with_grad = plain
    config = AlignPropConfig(
        mixed_precision="no", sample_num_steps=STEPS, sample_guidance_scale=SCALE,
        train_batch_size=count, truncated_backprop_rand=False,
        truncated_backprop_timestep=STEPS - k, save_freq=10**9,
        accelerator_kwargs={"cpu": True},
    )  # fmt: skip
    trainer = AlignPropTrainer(
        config, brightness, lambda: ("a fox", {}), pipeline, image_samples_hook=None
    )
    pipeline.sd_pipeline.set_progress_bar_config(disable=True)
    return lambda: trainer.step(0, 1)


def bare(work: Path, k: int, count: int, checkpointing: bool) -> Callable[[], None]:
    """The network evaluations of an update and their backward pass; no sampler, no optimiser."""
    import torch
    from torch.utils.checkpoint import checkpoint

    import sampler
    from sampler.models.trainable_lora import adapted

    engine = sampler.load(work / "pipeline", device="cpu")
    pipe, network = engine.pipeline.pipe, engine.pipeline.network
    holder = adapted(network, 4, 4, TARGETS, 0)
    kept = [holder, holder.__enter__()]
    x, prompts = torch.randn(2 * count, 4, 32, 32), ["a fox"] * count
    times = torch.tensor(pipe.scheduler.timesteps[:: 1000 // STEPS].tolist())

    def network_at(t: Any, x: Any, text: Any) -> Any:
        return network(x, t, text, return_dict=False)[0]

    def update() -> None:
        assert kept
        with torch.no_grad():
            cond = engine.pipeline.encode(prompts, [""] * count, True, (64, 64))
            text = [branch["encoder_hidden_states"] for branch in (cond.uncond, cond.cond)]
            text = torch.cat(text)
            for t in times[:-k]:
                network_at(t, x, text)
        out = x
        for t in times[-k:]:
            out = checkpoint(network_at, t, out, text, use_reentrant=False)
        cut = out[:count] + out[count:]
        image = checkpoint(pipe.vae.decode, cut, return_dict=False, use_reentrant=False)
        image[0].mean().backward()

    assert checkpointing
    return update


def _memory(field: str) -> float:
    """MiB of a field of /proc/self/status."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) / 1024


class Worker:
    """One side, in a separate process."""

    def __init__(self, name: str, work: Path, k: int, count: int, plain: bool = False) -> None:
        python = work / "trl" / "bin" / "python" if name == "trl" else sys.executable
        command = [str(python), __file__, "side", "--sides", name, "--work", str(work)]
        command += ["--k", str(k), "--batch", str(count), *(["--plain"] if plain else [])]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        # tensors in mappings of their own: what is freed leaves the resident set at once
        exact = {"MALLOC_MMAP_THRESHOLD_": "65536"} if k > 1 else {}
        self.process = subprocess.Popen(
            command, stderr=subprocess.DEVNULL, env={**os.environ, **exact}, **pipes
        )

    def update(self) -> dict[str, float]:
        """One more update, and its cost."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith('{"seconds"'):
                return json.loads(line)
        raise RuntimeError(f"{self.process.args} ended: run it by hand to see why")

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def timed(options: argparse.Namespace) -> list[tuple[str, float, str]]:
    """Medians of interleaved updates at K = 1; the first two of each are warm-up."""
    workers = {name: Worker(name, options.work, 1, options.batch) for name in options.sides}
    costs: dict[str, list[float]] = {name: [] for name in workers}
    for turn in range(options.rounds + 2):
        for name, worker in workers.items():
            seconds = worker.update()["seconds"]
            if turn >= 2:
                costs[name].append(seconds)
    for worker in workers.values():
        worker.close()
    medians = {name: statistics.median(values) for name, values in costs.items()}
    what = f"batch {options.batch}, T = 20, K = 1"
    lines = [(f"update, {what}: {name}", value, "CPU s") for name, value in medians.items()]
    for other in ("trl", "bare"):
        if "ours" in medians and other in medians:
            pairs = [a / b for a, b in zip(costs["ours"], costs[other], strict=True)]
            lines.append((f"update, {what}: ours / {other}", statistics.median(pairs), "ratio"))
    return lines


def remembered(options: argparse.Namespace) -> list[tuple[str, float, str]]:
    """Growth of memory in an update at K = T = 20, median of three; a process each."""
    found = {}
    for name in ("ours", "trl"):
        for plain in (False, True):
            worker = Worker(name, options.work, STEPS, options.batch, plain)
            worker.update()  # the libraries' own buffers
            found[name, plain] = statistics.median(worker.update()["mib"] for _ in range(3))
            worker.close()
    what = f"memory, batch {options.batch}, K = T = 20"
    lines = [
        (f"{what}, {'plain' if plain else 'checkpointed'}: {name}", value, "MiB")
        for (name, plain), value in found.items()
    ]
    share = found["ours", False] / found["ours", True]
    lines.append((f"{what}: ours, checkpointed / plain", share, "ratio"))
    share = found["ours", False] / found["trl", False]
    lines.append((f"{what}: checkpointed, ours / trl", share, "ratio"))
    return lines


def record(figures: Path, lines: list[tuple[str, float, str]]) -> None:
    """Replaces these measures in finetune_bench.csv."""
    import torch

    path, machine = figures / "finetune_bench.csv", f"{platform.machine()}, 1 thread"
    known: dict[str, list[str]] = {}
    if path.is_file():
        with path.open(encoding="utf-8") as file:
            known = {row[0]: row for row in list(csv.reader(file))[1:]}
    for name, value, unit in lines:
        known[name] = [name, f"{value:.4g}", unit, f"{machine}, torch {torch.__version__}"]
        print(*known[name][:3], flush=True)
    figures.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([["measure", "value", "unit", "machine"], *known.values()])


if __name__ == "__main__":
    main()
