"""`sampler.load`: an Engine over a pipeline that is bundled, in a folder, or already in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sampler.bundled import (
    BUNDLED_FLOW,
    BUNDLED_LCM,
    BUNDLED_PARTS,
    BUNDLED_SCALE,
    BUNDLED_SD3,
    BUNDLED_STUDENT,
    FOLDER,
    bundled_folder,
)
from sampler.config.model import OFFLOADS
from sampler.core.errors import ModelError
from sampler.engine.engine import Engine
from sampler.models import student_files
from sampler.models.controlnet import controlnet_paths
from sampler.models.ip_adapter import IP_ADAPTER, has_ip_adapter
from sampler.models.lora_files import checked_until, lora_pairs
from sampler.models.open_pipeline import find_files, open_pipeline


def load(
    source: Any = None,
    *,
    download: bool = False,
    revision: str | None = None,
    dtype: Any = None,
    variant: str | None = None,
    device: Any = None,
    weak: Any = None,
    student: Any = None,
    attention: str = "auto",
    config: str | Path | None = None,
    vae: str | Path | None = None,
    lora: Any = None,
    lora_until: float | None = None,
    controlnet: Any = None,
    ip_adapter: Any = None,
    offload: str | None = None,
    vae_tiling: bool = False,
    vae_slicing: bool = False,
    prompt_weights: bool = False,
    compile: bool = False,
) -> Engine:
    """An engine over a diffusers pipeline.

    source: None or "bundled" for the model inside this package, "bundled-lcm" for its few-step
    student (1 to 8 steps of the sampler "consistency"), "bundled-student" for the one that makes an
    image in one evaluation, "bundled-flow" for the same model on flow matching's levels,
    "bundled-sd3" for a small Stable Diffusion 3 of the same images; a folder
    in the diffusers layout; the name of a model on the Hugging Face Hub, from the local cache
    unless download=True; or a DiffusionPipeline, which is used as it is and not modified. A
    .safetensors file is read with the configurations of the folder `config`. vae: another VAE of
    the same latents, as the folder of the component or a single file in its original layout.
    revision: of a Hub model. dtype: "float32", "float16", "bfloat16" or a torch.dtype; by default
    what is stored on a GPU, float32 on a CPU. variant: of the weight files, such as "fp16". device:
    by default a GPU where there is one. weak: a second, weaker network for Autoguidance, as a
    folder or a module; the bundled model brings its own. student: a folder that the trainer
    "f_distill" wrote. attention: "auto" as loaded, "native" (torch's own) or "xformers". lora:
    adapters, as files or folders, pairs of one and a weight, or {path: weight}; lora_until: share
    of a run's steps, from the first, that use them, by default all. controlnet: folder of a
    ControlNet, or several; the control image is the input "control_image". ip_adapter:
    IP-Adapters as lora, each with its scale, beside the folder "image_encoder"; the image prompt is
    the input "ip_adapter_image". With either, the engine is hosted. offload: "model" or
    "sequential", parts wait in main memory. vae_tiling, vae_slicing: decoding with less memory.
    prompt_weights: read `(x:1.2)`, `(x)` and `[x]` in the prompts of Stable Diffusion and SDXL as
    weights (extra `weights`: compel); the weighted prompt is cut at the encoder's length like any
    other. compile: the repeated blocks of the network, by torch.compile.

    The engine's defaults are "ddim" and "cfg" at the scale of the stock pipeline (3 for the bundled
    model); with a student "consistency" and "student". A class without an adapter gives a hosted
    engine (`engine.hosted`), whose `generate` calls the pipeline itself. A folder is checked before
    diffusers opens it (`sampler/models/preflight.py`).

    Raises SamplerError (6) for a model that is missing, unsafe, broken or not supported, and
    ValueError for an argument that does not fit.
    """
    from sampler.pipelines import supported

    if offload not in (None, *OFFLOADS):
        raise ValueError(f"offload = {offload!r:.40} must be one of {', '.join(OFFLOADS)}.")
    bundled = source is None or (isinstance(source, str) and source in BUNDLED_PARTS)
    few_steps, flow = source == BUNDLED_LCM, source == BUNDLED_FLOW
    if few_steps and weak is not None:
        raise ValueError(f"weak has no effect on {BUNDLED_LCM}, which is not guided; leave it out.")
    if source == BUNDLED_STUDENT and student is None:
        student = student_files.BUNDLED
    extras = {"controlnet": controlnet_paths(controlnet),
              "ip_adapter": lora_pairs(ip_adapter, IP_ADAPTER)}  # fmt: skip
    hosted = next((name for name, value in extras.items() if value), None)
    if hosted is not None and (few_steps or flow):
        raise ValueError(f"{hosted} does not work with {source}; load the model bundled.")
    if bundled:
        if source in (BUNDLED_FLOW, BUNDLED_SD3) and student is not None:
            raise ValueError(
                f"student has no effect on {source}, which has other levels; leave it out."
            )
        if source not in (BUNDLED_LCM, BUNDLED_SD3) and weak is None and hosted is None:
            weak = FOLDER / "weak"
        source = bundled_folder(source)
    files, until = {"config": config, "revision": revision, "variant": variant, "vae": vae}, None
    if isinstance(source, (str, Path)):
        until = checked_until(lora_until, lora is not None, hosted is not None)
        found = find_files(source, download, files)
        place = {"device": device, "offload": offload, "tiling": vae_tiling, "slicing": vae_slicing}
        pipe: Any = open_pipeline(found, dtype, lora_pairs(lora), **extras, **place)
    else:
        given = {**files, "dtype": dtype, "device": device, "lora": lora, "offload": offload,
                 "lora_until": lora_until, "controlnet": controlnet,
                 "ip_adapter": ip_adapter}  # fmt: skip
        flags = {"download": download, "vae_tiling": vae_tiling, "vae_slicing": vae_slicing,
                 "compile": compile, "attention": attention != "auto"}  # fmt: skip
        given.update((name, value or None) for name, value in flags.items())
        if bad := [name for name, value in given.items() if value is not None]:
            raise ValueError(f"{bad[0]} has no effect on a pipeline that is loaded already.")
        pipe = source
    if few_steps:
        from sampler.models.few_step import pipeline

        pipe = pipeline(pipe)
    if type(pipe).__name__ not in supported() or has_ip_adapter(pipe):
        given = {"weak": weak, "student": student, "compile": compile or None,
                 "prompt_weights": prompt_weights or None, "lora_until": until}  # fmt: skip
        given["attention"] = None if attention == "auto" else attention
        rule = {"name": "cfg", "scale": BUNDLED_SCALE} if bundled else None
        return _hosted(pipe, [n for n, value in given.items() if value is not None], None, rule)
    if prompt_weights and offload == "sequential":
        raise ValueError("prompt_weights does not work with offload = 'sequential'.")
    return _adapted(
        pipe, bundled=bundled, flow=flow, attention=attention, compiled=compile, weak=weak,
        student=student, prompt_weights=prompt_weights, until=until,
    )  # fmt: skip


def _adapted(
    pipe: Any,
    *,
    bundled: bool,
    flow: bool,
    attention: str,
    compiled: bool,
    weak: Any,
    student: Any,
    prompt_weights: bool,
    until: float | None,
) -> Engine:
    """An engine over the adapter of a pipeline's family; arguments as for `load`."""
    from sampler.models.attention import set_attention
    from sampler.models.lora import limit_loras
    from sampler.models.options import compile_blocks
    from sampler.pipelines import adapt
    from sampler.pipelines.flow_view import FlowView

    build = FlowView if flow else adapt
    adapter = build(pipe)
    set_attention(adapter.network, attention)
    if compiled:
        compile_blocks(adapter.network)
    if weak is not None:
        adapter = build(pipe, _read_weak(weak, adapter.network))
    if prompt_weights:
        adapter = adapter.with_prompt_weights()
    if until is not None:
        limit_loras(adapter, until)
    if bundled:
        from sampler.pipelines.classes import BundledClasses

        adapter.classes = BundledClasses(adapter)
        adapter.embedded_scale = BUNDLED_SCALE
    if student is not None:
        from sampler.models.student import with_student

        adapter = with_student(adapter, student)
        return Engine(adapter, adapter, "consistency", "student")
    rule = {**adapter.default_guidance, **({"scale": BUNDLED_SCALE} if bundled else {})}
    engine = Engine(adapter, adapter, adapter.default_sampler, rule)
    if not flow:  # the pipeline itself has other levels
        if "match_norm" in rule:  # the stock pipeline's latents are tokens
            rule["match_norm"] = [-1]
        engine.host = lambda: _hosted(pipe, [], engine.sampler, rule)
    return engine


def _hosted(pipe: Any, unused: list[str], sampler: Any = None, guidance: Any = None) -> Engine:
    """An engine that calls the pipeline itself; `unused`: arguments that need an adapter."""
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    from sampler.engine.hosted import HostedEngine

    if not isinstance(pipe, DiffusionPipeline):
        raise ModelError(f"{type(pipe).__name__} is not a diffusers pipeline.")
    if unused:
        raise ValueError(
            f"{unused[0]} has no effect on {type(pipe).__name__}, which is hosted: its own call "
            "runs."
        )
    return HostedEngine(pipe, sampler, guidance)


def _read_weak(weak: Any, network: Any) -> Any:
    """The weak network: a module, or one of the main network's class from a folder."""
    from sampler.models.student import read_network

    if not isinstance(weak, (str, Path)):
        return weak
    return read_network(network, Path(weak).expanduser())
