"""LoRAs of any tool that diffusers reads, loaded into a pipeline completely, or refused by name.

    W' = W + weight·(alpha/rank)·B·A        A: [rank, in], B: [out, rank]

The stock loaders convert and inject (`load_lora_weights`; peft alone for pipelines without one).
They skip tensors that they do not know with a warning at most, so every tensor of a file is looked
up in the loaded layers afterwards.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.loaders.lora_base import LoraBaseMixin
from torch import Tensor, nn

from sampler.core.errors import ModelError, UsageError
from sampler.models.lora_checks import check_tensors, fold_alphas, misfit, reason_of, unused_tensors
from sampler.models.lora_files import LoraSource, checked_until, lora_file, lora_pairs, read_lora
from sampler.pipelines.loras import lora_layers

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    from sampler.core.loop import Loop


def load_lora(engine: Loop, *sources: LoraSource, until: float | None = None) -> None:
    """Adds LoRAs to an engine's pipeline, each at weight·ΔW (1 where none is given).

    A source is a file, a folder that has one, or the run folder of a fine-tuning; or a pair of it
    and the weight. until: share of a run's steps, from the first, that this engine uses the LoRAs
    in, above 0; None is all of them. The pipeline is changed; `unload_lora` undoes it. Raises
    ModelError for a file that is missing, unsafe or does not fit, UsageError where LoRAs are on
    already, and where `until` is given for a LoRA of more than the network.
    """
    loras = lora_pairs(sources)
    until = checked_until(until, bool(loras), engine.hosted)
    apply_loras(engine.pipeline.pipe, loras)
    limit_loras(engine.pipeline, until)


def limit_loras(adapter: Any, until: float | None) -> None:
    """Lets an adapter use its LoRAs in a share of the steps only. Errors as `load_lora`."""
    parts = _modules(adapter.pipe)
    others = [n for n, part in parts.items() if part is not adapter.network and lora_layers(part)]
    if until is not None and others:
        for part in parts.values():
            strip_loras(part)
        raise UsageError(
            f"until takes a LoRA away during a run, and this one changes {others[0]} as well, "
            "which is used before it; load it for all steps."
        )
    adapter.lora_until = until


def apply_loras(pipe: DiffusionPipeline, loras: Sequence[tuple[Path, float]]) -> None:
    """Adds LoRAs to the components of a pipeline. Errors as `load_lora`; none is left in then."""
    parts = _modules(pipe)
    for part in parts.values():
        check_bare(part)
    if not isinstance(pipe, LoraBaseMixin):
        name = "unet" if "unet" in parts else "transformer"
        put_lora(parts[name], name, *loras)
        return

    loader: Any = pipe

    def load(path: Path, tensors: dict[str, Tensor], header: dict[str, Any], name: str) -> None:
        source: dict[str, Any] = {"adapter_name": name}
        if header:  # which the loader reads from a file only
            source.update(weight_name=path.name, local_files_only=True, use_safetensors=True)
        loader.load_lora_weights(str(path.parent) if header else dict(tensors), **source)

    _load_all(parts, loras, load, type(pipe).__name__)


def put_lora(network: nn.Module, prefix: str, *loras: LoraSource) -> None:
    """Adds LoRAs with a configuration in the header to a network alone, by peft.

    prefix: the pipeline's name for the network. Errors as `load_lora`.
    """
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    check_bare(network)

    def load(path: Path, tensors: dict[str, Tensor], header: dict[str, Any], name: str) -> None:
        state, config = _without(tensors, prefix), _without(header, prefix)
        if not state or not config:
            raise ModelError(
                f"{path} is not a LoRA of a {prefix} with its configuration in the header; "
                "files of other tools need a pipeline with load_lora_weights."
            )
        chosen = LoraConfig(**{k: v for k, v in config.items() if v is not None})
        inject_adapter_in_model(chosen, network, name)
        set_peft_model_state_dict(network, state, adapter_name=name)

    _load_all({prefix: network}, lora_pairs(loras), load, "this pipeline")


def unload_lora(engine: Loop) -> None:
    """Removes every LoRA from an engine's pipeline."""
    for part in _modules(engine.pipeline.pipe).values():
        strip_loras(part)
    if not engine.hosted:
        limit_loras(engine.pipeline, None)


def merge_lora(network: nn.Module) -> None:
    """Adds ΔW of every LoRA to the network's own weights, and removes the LoRAs."""
    for layer in lora_layers(network):
        layer.merge()
    strip_loras(network)


def strip_loras(network: nn.Module) -> None:
    """Restores the layers below the LoRAs."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(network.named_modules()):
        if isinstance(module, BaseTunerLayer):
            parent, _, leaf = name.rpartition(".")
            setattr(network.get_submodule(parent), leaf, module.get_base_layer())
    vars(network).pop("peft_config", None)
    if "_hf_peft_config_loaded" in vars(network):
        vars(network)["_hf_peft_config_loaded"] = False


def check_bare(network: nn.Module) -> None:
    """Raises UsageError for a network that has LoRAs."""
    if lora_layers(network):
        raise UsageError(
            "The network has LoRAs already; take them off first (unload_lora, or "
            "pipe.unload_lora_weights), or fuse them."
        )


def _load_all(parts: dict[str, nn.Module], loras: Sequence[tuple[Path, float]], load: Any,
              target: str) -> None:  # fmt: skip
    """Loads each file with `load`, checks that all of it is there, and sets the weights."""
    frozen = {id(p): p.requires_grad for part in parts.values() for p in part.parameters()}
    weights: dict[str, float] = {}
    try:
        for number, (source, weight) in enumerate(loras):
            path = lora_file(source)
            tensors, header = read_lora(path)
            check_tensors(path, tensors)
            name = f"lora_{number}"
            try:
                with quiet():
                    load(path, fold_alphas(tensors), header, name)
            except (ModelError, MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # any error of the loaders on an unknown layout
                foreign = [key for key in tensors if "lora" not in key] or tensors
                raise misfit(path, foreign, target, reason_of(error, tensors)) from error
            if unused := unused_tensors(tensors, parts, name):
                more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
                why = f"no layer takes its tensor {unused[0]}{more}"
                raise misfit(path, {key: tensors[key] for key in unused}, target, why)
            weights[name] = weight
    except BaseException:
        for part in parts.values():
            strip_loras(part)
        raise
    for layer in (layer for part in parts.values() for layer in lora_layers(part)):
        layer.set_adapter([name for name in weights if name in layer.scaling])
        for name, weight in weights.items():
            layer.set_scale(name, weight)
    for part in parts.values():
        for parameter in part.parameters():
            parameter.requires_grad_(frozen.get(id(parameter), False))


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress progress bars and log messages of loaders, whose skipped tensors are refused here,
    and of writers."""
    from transformers.utils import logging as bars

    shown, before = bars.is_progress_bar_enabled(), logging.root.manager.disable
    bars.disable_progress_bar()
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        logging.disable(before)
        if shown:
            bars.enable_progress_bar()


def _modules(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def _without(tree: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The entries below "prefix.", without it."""
    start = f"{prefix}."
    return {k.removeprefix(start): v for k, v in tree.items() if k.startswith(start)}
