"""Options of a load that diffusers applies: offloading, VAE tiles and slices, compiled blocks."""

from __future__ import annotations

from typing import Any

from sampler.core.errors import ModelError, first_line


def place(pipe: Any, device: Any, offload: str | None) -> None:
    """Moves a pipeline to its device; or lets its parts wait in main memory, with `offload`.

    "model" brings one part at a time to the device, "sequential" one layer at a time. Raises
    SamplerError (6) where diffusers cannot do it.
    """
    if offload is None:
        pipe.to(device)
        return
    enable = getattr(pipe, f"enable_{offload}_cpu_offload")
    try:
        enable(device=device)
    except (RuntimeError, ValueError) as error:
        raise ModelError(
            f"offload = {offload!r} is not possible on {device}: {first_line(error)}"
        ) from error


def set_vae(pipe: Any, tiling: bool, slicing: bool) -> None:
    """Decodes in tiles, or one image at a time: less memory. SamplerError (6) where it cannot."""
    for wanted, name in ((tiling, "enable_tiling"), (slicing, "enable_slicing")):
        if not wanted:
            continue
        enable = getattr(getattr(pipe, "vae", None), name, None)
        if enable is None:
            raise ModelError(f"The VAE of {type(pipe).__name__} has no {name[7:]}.")
        enable()


def compile_blocks(network: Any, backend: str = "inductor") -> None:
    """Compiles a network's repeated blocks, each once, without a graph break.

    Raises SamplerError (6) for a network that names none.
    """
    if not getattr(network, "_repeated_blocks", None):
        raise ModelError(
            f"{type(network).__name__} names no repeated blocks to compile; leave compile out."
        )
    network.compile_repeated_blocks(fullgraph=True, backend=backend)
