"""`sampler.load`: an Engine over a pipeline that is bundled, in a folder, or already in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sampler.engine import Engine
from sampler.types import SamplerError

BUNDLED = {"bundled": "pipeline"}
BUNDLED_SCALE = 3.0  # the best prompt accuracy and Fréchet distance of the scales in its card


def load(source: Any = None, **options: Any) -> Engine:
    """An engine over a text-to-image pipeline.

    source: None or "bundled" for the model inside this package, a folder in the diffusers layout,
    or a DiffusionPipeline, which is not modified. options go to `from_pretrained`.

    Raises SamplerError (6) for a pipeline that is missing, unsafe or not supported.
    """
    from sampler.pipelines import adapt

    bundled = source is None or (isinstance(source, str) and source in BUNDLED)
    if bundled:
        from sampler import bundled as package

        source = package.FOLDER / BUNDLED[source or "bundled"]
    pipe = _read(Path(source), options) if isinstance(source, (str, Path)) else source
    adapter = adapt(pipe)
    scale = BUNDLED_SCALE if bundled else adapter.default_scale
    return Engine(adapter, adapter, "ddim", {"name": "cfg", "scale": scale})


def _read(folder: Path, options: dict[str, Any]) -> Any:
    import torch
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    if not (folder / "model_index.json").is_file():
        raise SamplerError(f"{folder} is no diffusers pipeline: it has no model_index.json.", 6)
    options = {"dtype": torch.float32, "local_files_only": True, "use_safetensors": True, **options}
    pipe = DiffusionPipeline.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe
