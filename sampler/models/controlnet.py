"""ControlNets from folders, beside the components of a loaded pipeline. Imports no torch to check.

A ControlNet (Zhang et al., 2023, arXiv:2302.05543) adds residuals of a control image to the
network of a pipeline, whose class has to call it: diffusers' ControlNet class of the same family.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sampler.core.errors import ModelError
from sampler.models.folder import read_json
from sampler.models.preflight import CONFIG, check_component
from sampler.models.read import load_or_refuse, quiet, refuse_missing_weights

_UNION = "ControlNetUnionModel"


def controlnet_paths(given: Any) -> list[Path]:
    """Folders of ControlNets given as one or several; empty for None."""
    if given is None:
        return []
    return [
        Path(one).expanduser() for one in ([given] if isinstance(given, (str, Path)) else given)
    ]


def controlnet_name(folder: Path) -> str:
    """Class name of a ControlNet's folder, checked to be complete and safe. Raises ModelError."""
    check_component(folder)
    name = str(read_json(folder / CONFIG).get("_class_name"))
    if not name.endswith(("ControlNetModel", _UNION)):
        raise ModelError(
            f"{folder} holds {name!r:.60}, which is not a ControlNet class of diffusers."
        )
    return name


def class_with(cls: type, folders: Sequence[Path]) -> type:
    """Class of diffusers that calls these ControlNets over `cls`. Raises ModelError."""
    from sampler.pipelines.serving import controlnet_class

    names = [controlnet_name(folder) for folder in folders]
    if _UNION in names and len(names) > 1:
        raise ModelError("A union ControlNet takes several images itself; give it alone.")
    return controlnet_class(cls, _UNION in names)


def with_controlnets(pipe: Any, folders: Sequence[Path]) -> Any:
    """The pipeline of the class that calls the ControlNets, over the components of `pipe`.

    Raises ModelError for folders that hold no ControlNet, or one of another family.
    """
    from sampler.pipelines.serving import with_class

    cls = class_with(type(pipe), folders)
    nets = [_read(folder, pipe.dtype) for folder in folders]
    net = nets[0] if len(nets) == 1 else nets
    return load_or_refuse(folders[0], lambda: with_class(pipe, cls, controlnet=net))


def _read(folder: Path, dtype: Any) -> Any:
    import diffusers

    cls: Any = getattr(diffusers, controlnet_name(folder), None)
    if cls is None:
        raise ModelError(f"{folder} is of a class that the installed diffusers does not have.")
    options = {"use_safetensors": True, "local_files_only": True, "torch_dtype": dtype}
    with quiet(), refuse_missing_weights(folder):
        return load_or_refuse(folder, lambda: cls.from_pretrained(str(folder), **options))
