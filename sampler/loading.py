"""`sampler.load`: an Engine over a pipeline that is bundled, in a folder, or already in memory."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sampler.bundled import BUNDLED_LCM, BUNDLED_PARTS, BUNDLED_SCALE, BUNDLED_STUDENT, FOLDER
from sampler.core.errors import ModelError, SamplerError, first_line
from sampler.engine import Engine
from sampler.models import preflight, student_files
from sampler.models.folder import HUB_ID, find
from sampler.models.lora_files import lora_pairs

if TYPE_CHECKING:
    import torch

_DTYPES = ("float32", "float16", "bfloat16")
_STORED = {"F16": "float16", "BF16": "bfloat16"}
# Remarks of the libraries at load that are about their own affairs: logger, start of the message.
_CHATTER = (
    ("transformers.utils.import_utils", r"`\w+ImageProcessor` requires torchvision"),
    ("diffusers.pipelines.pipeline_utils", r"Expected types for vae: .*AutoencoderTiny"),
)


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
    lora: Any = None,
    offload: str | None = None,
    vae_tiling: bool = False,
    vae_slicing: bool = False,
    compile: bool = False,
) -> Engine:
    """An engine over a diffusers pipeline.

    source: None or "bundled" for the model inside this package, "bundled-lcm" for its few-step
    student (1 to 8 steps of the sampler "consistency"), "bundled-student" for the one that makes an
    image in one evaluation; a folder in the diffusers layout;
    the name of a model on the Hugging Face Hub, from the local cache unless download=True; or a
    DiffusionPipeline, which is used as it is and not modified. A .safetensors file is read with the
    configurations of the folder `config`. revision: of a Hub model. dtype:
    "float32", "float16", "bfloat16" or a torch.dtype; by default what is stored on a GPU, float32
    on a CPU. variant: of the weight files, such as "fp16". device: by default a GPU where there is
    one. weak: a second, weaker network for Autoguidance, as a folder or a module; the bundled
    model brings its own. student: a folder that the trainer "f_distill" wrote. attention: "auto"
    as loaded, "native" (torch's own) or "xformers". lora: adapters, as files or folders, pairs of
    one and a weight, or {path: weight}. offload: "model" or "sequential", parts wait in main
    memory. vae_tiling, vae_slicing: decoding with less memory. compile: the repeated blocks of the
    network, by torch.compile.

    The engine's defaults are "ddim" and "cfg" at the scale of the stock pipeline (3 for the bundled
    model); with a student "consistency" and "student". A folder is checked before diffusers opens
    it (`sampler/models/preflight.py`).

    Raises SamplerError (6) for a model that is missing, unsafe, broken or not supported, and
    ValueError for an argument that does not fit.
    """
    from sampler.models.attention import set_attention
    from sampler.models.lora import apply_loras
    from sampler.models.options import OFFLOADS, compile_blocks, place, set_vae
    from sampler.pipelines import adapt

    if offload not in (None, *OFFLOADS):
        raise ValueError(f"offload = {offload!r:.40} must be one of {', '.join(OFFLOADS)}.")
    few_steps = source == BUNDLED_LCM
    if source == BUNDLED_STUDENT and student is None:
        student = student_files.BUNDLED
    bundled = source is None or (isinstance(source, str) and source in BUNDLED_PARTS)
    if bundled:
        source = FOLDER / "pipeline"
        weak = FOLDER / "weak" if weak is None and (FOLDER / "weak").is_dir() else weak
    if isinstance(source, (str, Path)):
        folder = _folder(source, download, revision, variant)
        pipe: Any = _read(folder, dtype, variant, device, config)
        if loras := lora_pairs(lora):
            apply_loras(pipe, loras)
        _opened(folder, lambda: place(pipe, _device(device), offload))
        set_vae(pipe, vae_tiling, vae_slicing)
    else:
        given = {"revision": revision, "dtype": dtype, "variant": variant, "device": device}
        given.update(config=config, lora=lora, offload=offload, compile=compile or None)
        given.update(vae_tiling=vae_tiling or None, vae_slicing=vae_slicing or None)
        given["attention"] = None if attention == "auto" else attention
        if bad := [name for name, value in given.items() if value is not None]:
            raise ValueError(f"{bad[0]} has no effect on a pipeline that is loaded already.")
        pipe = source
    if few_steps:
        from sampler.models.few_step import pipeline

        pipe, weak = pipeline(pipe), None
    adapter = adapt(pipe)
    set_attention(adapter.network, attention)
    if compile:
        compile_blocks(adapter.network)
    if weak is not None:
        adapter = adapt(pipe, _read_weak(weak, adapter.network))
    if bundled:
        from sampler.pipelines.classes import BundledClasses

        adapter.classes = BundledClasses(adapter)
        adapter.embedded_scale = BUNDLED_SCALE
    if student is not None:
        from sampler.models.student import with_student

        adapter = with_student(adapter, student)
        return Engine(adapter, adapter, "consistency", "student")
    rule = {**adapter.default_guidance, **({"scale": BUNDLED_SCALE} if bundled else {})}
    return Engine(adapter, adapter, adapter.default_sampler, rule)


def _folder(source: str | Path, download: bool, revision: str | None, variant: str | None) -> Path:
    """Path of a model's files, after fetching a Hub model where `download` is set."""
    if not download or Path(source).expanduser().exists() or not HUB_ID.fullmatch(str(source)):
        return find(source, revision)
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    try:
        folder = DiffusionPipeline.download(
            str(source), revision=revision, variant=variant, use_safetensors=True
        )
    except Exception as error:
        raise ModelError(f"{source} cannot be downloaded: {first_line(error)}") from error
    return Path(folder)


def _read(folder: Path, dtype: Any, variant: str | None, device: Any, config: Any) -> Any:
    """The pipeline in a folder or a file, on the CPU."""
    from sampler.models.single_file import is_file, read_single_file
    from sampler.pipelines import supported

    one = is_file(folder)
    if not one:
        if config is not None:
            raise ValueError("config goes with a single file; a folder has its own.")
        name = preflight.check(folder)
        if name not in supported():
            raise ModelError(
                f"{name} is not a supported pipeline; supported: {', '.join(supported())}."
            )
        _has_variant(folder, variant)
    elif variant is not None:
        raise ValueError("variant goes with a folder; a single file is what it is.")
    kind = _dtype(dtype, _device(device), folder)
    with _quiet():
        from diffusers.pipelines.pipeline_utils import DiffusionPipeline

        def read() -> Any:
            if one:
                return read_single_file(folder, config, {"torch_dtype": kind})
            return DiffusionPipeline.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=kind, variant=variant
            )

        pipe = _opened(folder, read)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _has_variant(folder: Path, variant: str | None) -> None:
    if variant is None or any(folder.glob(f"*/*.{variant}*.safetensors")):
        return
    names = (path.name.split(".") for path in folder.glob("*/*.safetensors"))
    found = sorted({parts[1] for parts in names if len(parts) == 3})
    there = f"it has {', '.join(found)}" if found else "it has none"
    raise ModelError(f"{folder} has no weights of the variant {variant!r:.40}; {there}.")


def _device(device: Any) -> torch.device:
    import torch

    try:
        return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(f"device = {device!r:.40} is no device of torch; use 'cpu'.") from None


def _read_weak(weak: Any, network: Any) -> Any:
    """The weak network: a module, or one of the main network's class from a folder."""
    if not isinstance(weak, (str, Path)):
        return weak
    folder = Path(weak).expanduser()
    preflight.check_component(folder)
    options = {"torch_dtype": network.dtype, "local_files_only": True, "use_safetensors": True}
    return _opened(
        folder, lambda: type(network).from_pretrained(folder, **options).to(network.device)
    )


def _opened(folder: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except (SamplerError, MemoryError):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        raise ModelError(f"{folder} cannot be loaded: {first_line(error)}") from error


def _dtype(dtype: Any, device: torch.device, folder: Path) -> torch.dtype:
    import torch

    name = str(dtype).removeprefix("torch.") if dtype is not None else None
    if name is None and device.type == "cuda":
        parts = [folder / part for part in ("unet", "transformer")]
        files = sorted(path for part in parts for path in part.glob("*.safetensors"))
        files = [folder] if folder.is_file() else files
        name = _STORED.get(preflight.stored_dtype(files[0])) if files else None
    if name not in (None, *_DTYPES):
        raise ValueError(f"dtype = {name!r:.40} must be one of {', '.join(_DTYPES)}.")
    return getattr(torch, name or "float32")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars and the remarks that say nothing about the model; warnings stay."""
    from diffusers.utils import logging as diffusers_bars
    from transformers.utils import logging as transformers_bars

    shown = [bars for bars in (diffusers_bars, transformers_bars) if bars.is_progress_bar_enabled()]
    drops = [(logging.getLogger(name), _Drop(re.compile(text))) for name, text in _CHATTER]
    for logger, drop in drops:
        logger.addFilter(drop)
    for bars in shown:
        bars.disable_progress_bar()
    try:
        yield
    finally:
        for bars in shown:
            bars.enable_progress_bar()
        for logger, drop in drops:
            logger.removeFilter(drop)


class _Drop(logging.Filter):
    """Drops the records whose message matches."""

    def __init__(self, pattern: re.Pattern[str]) -> None:
        super().__init__()
        self.pattern = pattern

    def filter(self, record: logging.LogRecord) -> bool:
        return not self.pattern.search(record.getMessage())
