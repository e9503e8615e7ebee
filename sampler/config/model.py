"""Options of a model: one table for `sampler.load`, the section `model` of configurations, the
command line and the playground.

A field of `ModelConfig` is an argument of `sampler.load` of the same name (`path` is its first
one), a key below `model`, and a command-line option (`--vae-tiling`; `path` is `--model`, `config`
is `--model-config`). Each says how it enters the identity of a model:

    files   by the content of the files that it selects
    value   by its value, since it selects another arithmetic
    none    not at all: it says where and in which order the same numbers are computed
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, get_args

Dtype = Literal["auto", "float32", "float16", "bfloat16"]
Attention = Literal["auto", "native", "xformers"]
Offload = Literal["model", "sequential"]
Identity = Literal["files", "value", "none"]

DTYPES: tuple[str, ...] = get_args(Dtype)[1:]
ATTENTIONS: tuple[str, ...] = get_args(Attention)
OFFLOADS: tuple[str, ...] = get_args(Offload)


def _option(
    default: Any,
    identity: Identity,
    help: str,
    flag: str | None = None,
    metavar: str | None = None,
    load: bool = True,
) -> Any:
    metadata = {
        "identity": identity, "help": help, "flag": flag, "metavar": metavar, "load": load
    }  # fmt: skip
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ModelConfig:
    """Model section.

    path: a diffusers folder, a Hub id or a .safetensors file; null is the bundled model. config:
    folder with the configurations of a single file. dtype, device, attention: auto is the default
    of `sampler.load`. lora: PATH or PATH:weight each; lora_until: share
    of a run's steps that they are used in. controlnet: folders; ip_adapter: PATH or
    PATH:scale each; with either, the stock pipeline's call makes the images. student: folder of a
    student made by `sampler finetune`; its sampler, guidance and steps become the defaults. grid:
    noise levels instead of the model's own, see `Schedule.grid`; recorded with every image.
    drop_encoders: encode all texts of a run first and free the text encoders before denoising.
    """

    path: str | None = _option(
        None, "files", "Model folder, .safetensors file or Hub id; default: bundled.", "--model"
    )
    config: str | None = _option(
        None,
        "files",
        "Folder with the configurations of a single-file model.",
        "--model-config",
        "DIR",
    )
    revision: str | None = _option(None, "files", "Hub revision (commit or tag).")
    variant: str | None = _option(
        None, "files", "Variant of the weight files, such as fp16.", metavar="NAME"
    )
    vae: str | None = _option(
        None, "files", "Replacement VAE: a folder or a .safetensors file.", metavar="PATH"
    )
    lora: tuple[str, ...] = _option(
        (), "files", "LoRA file or folder to load; repeatable.", metavar="PATH[:WEIGHT]"
    )
    lora_until: float | None = _option(
        None, "value", "Share of the steps with the LoRAs, from the first.", metavar="SHARE"
    )
    controlnet: tuple[str, ...] = _option(
        (), "files", "ControlNet folder; repeatable, one per --control-image.", metavar="DIR"
    )
    ip_adapter: tuple[str, ...] = _option(
        (),
        "files",
        "IP-Adapter file or folder; repeatable, one per --ip-image.",
        metavar="PATH[:SCALE]",
    )
    student: str | None = _option(
        None, "files", "One-step student made by `finetune`.", metavar="DIR"
    )
    weak: str | None = _option(None, "files", "Weaker network for autoguidance.", metavar="DIR")
    dtype: Dtype = _option("auto", "value", "Data type of the networks.")
    device: str = _option(
        "auto", "none", "Device to run on; default: auto.", metavar="auto|cpu|cuda|cuda:N|mps"
    )
    attention: Attention = _option("auto", "value", "Attention backend.")
    offload: Offload | None = _option(None, "none", "Offload parts of the model to CPU memory.")
    vae_tiling: bool = _option(False, "value", "Decode large images in tiles.")
    vae_slicing: bool = _option(False, "none", "Decode one image at a time.")
    prompt_weights: bool = _option(False, "value", "Read weights such as (x:1.2) in prompts.")
    compile: bool = _option(False, "value", "Compile the repeated blocks of the network.")
    grid: str | dict[str, Any] | list[float] | None = _option(
        None,
        "none",
        "Grid of noise levels: karras, beta, ...; or numbers.",
        metavar="NAME|SIGMA,...",
        load=False,
    )
    drop_encoders: bool = _option(
        False, "none", "Free the text encoders before denoising.", load=False
    )
    __pydantic_config__: ClassVar[Any] = {
        "extra": "forbid",
        "strict": True,
        "allow_inf_nan": False,
    }


def flag_of(name: str) -> str:
    """Command-line option of a field: "--vae-tiling" of "vae_tiling"."""
    flag = next(f.metadata["flag"] for f in fields(ModelConfig) if f.name == name)
    return flag or "--" + name.replace("_", "-")


def changed(model: ModelConfig) -> dict[str, Any]:
    """Fields that differ from their defaults."""
    pairs = ((f, getattr(model, f.name)) for f in fields(model))
    return {f.name: value for f, value in pairs if value != f.default}


def load_arguments(model: ModelConfig) -> dict[str, Any]:
    """Arguments of `sampler.load` that a section stands for, without `source` (the path)."""
    rest = {f.name for f in fields(ModelConfig) if not f.metadata["load"]} | {"path"}
    given = {name: value for name, value in changed(model).items() if name not in rest}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in given.items()}
