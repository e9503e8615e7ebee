"""Sampler names of other programs.

    alias("DPM++ 2M Karras")    {"sampler": {"name": "dpmpp_2m"}, "grid": "karras"}

The names are those of A1111 and Forge, ComfyUI, diffusers' schedulers, stable-diffusion.cpp and
SD.Next. Case, spaces, "_", "k_", "sample_", "_gpu" and "Scheduler" do not matter, "++" is "pp".
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

from sampler import registry


class Known(NamedTuple):
    """A sampler of ours, A1111's automatic grid for the name, and what differs elsewhere."""

    sampler: dict[str, Any]
    automatic: str | None = None
    note: str = ""


def _known(name: str, automatic: str | None = None, note: str = "", **fields: Any) -> Known:
    return Known({"name": name, **fields}, automatic, note)


_EXACT = "a third-order DPM++ of diffusers, which has another formula"
_COMFY_DEIS = "ComfyUI's deis has order 3 and coefficients of another table of noise levels"
_NEAR = "that scheduler is the same method only approximately"
# names, "; " apart -> ours
_TABLE: Mapping[str, Known] = {
    "Euler; EulerDiscrete; FlowMatchEuler; FlowMatchEulerDiscrete": _known("ddim"),
    "Euler a; euler_ancestral; EulerAncestralDiscrete": _known("euler_ancestral"),
    "DDIM; DDIMParallel": _known("ddim"),
    "DDPM; DDPMParallel": _known("ddim", eta=1.0),
    "Heun; HeunDiscrete; FlowMatchHeun; FlowMatchHeunDiscrete": _known("heun"),
    "LMS; LMSDiscrete": _known("ab", order=4, steps="variable"),
    "PLMS; ipndm; PNDM": _known("ab", note="there the last step is of first order", order=4),
    "DPM++ 2M; DPMSolverMultistep": _known("dpmpp_2m", "karras"),
    "DPM++ 2M SDE; dpm++2m_sde_bt; sde-dpmsolver++": _known("dpmpp_2m_sde", "exponential"),
    "DPM++ 2M SDE Heun": _known("dpmpp_2m_sde", "exponential", solver_type="heun"),
    "DPM++ 3M SDE": _known("dpmpp_3m_sde", "exponential", f"it is not {_EXACT}"),
    "DPM++ SDE": _known("dpmpp_sde", "karras"),
    "DPMSolverSDE; DPMSolverSinglestep": _known("dpmpp_sde", "karras", _NEAR),
    "DPM++ 2S a; dpmpp_2s_ancestral": _known("dpmpp_2s", "karras", eta=1.0),
    "dpmpp_2s": _known("dpmpp_2s", "karras"),
    "UniPC; UniPCMultistep": _known("unipc"),
    "uni_pc": _known("unipc", order=3, variant="bh1", clock="auto"),
    "uni_pc_bh2": _known("unipc", order=3, variant="bh2", clock="auto"),
    "DEIS; DEISMultistep": _known("deis", note=_COMFY_DEIS),
    "res_multistep; RES-Multistep 2M; res_2m": _known("res_multistep"),
    "res_multistep_ancestral": _known(
        "res_multistep", note="ComfyUI's leaves noise in the images of flow models", eta=1.0
    ),
    "er_sde; ER-SDE 3M": _known("er_sde"),
    "ER-SDE": _known(
        "er_sde", note="SD.Next's ER-SDE is order 1, ComfyUI's er_sde order 3", order=1
    ),
    "ER-SDE 2M": _known("er_sde", order=2),
    "sa_solver; SASolver": _known("sa_solver"),
    "sa_solver_pece": _known("sa_solver", pece=True),
    "seeds_2": _known("res_2s", solver_type="phi_1", eta=1.0),
    "exp_heun_2_x0": _known("res_2s", r=1.0),
    "exp_heun_2_x0_sde": _known("res_2s", r=1.0, eta=1.0),
    "res_2s": _known("res_2s"),
    "gradient_estimation; euler_ge": _known("gradient_estimation"),
    "LCM; FlowMatchLCM": _known("consistency"),
}
# names that are refused -> the nearest of ours
_REFUSED: Mapping[str, str] = {
    "Restart": "heun", "DPM fast": "dpmpp_2s", "DPM adaptive": "dpmpp_2m", "DPM2": "heun",
    "dpm_2": "heun", "DPM2 a": "dpmpp_2s", "dpm_2_ancestral": "dpmpp_2s", "seeds_3": "res_2s",
    "heunpp2": "heun", "KDPM2Discrete": "heun", "KDPM2AncestralDiscrete": "dpmpp_2s",
}  # fmt: skip
# words at the end of a name -> grid
_GRIDS: Mapping[str, str | None] = {
    "polyexponential": "polyexponential", "exponential": "exponential", "karras": "karras",
    "sgmuniform": "sgm_uniform", "ddimuniform": "ddim_uniform", "linearquadratic":
    "linear_quadratic", "simple": "simple", "normal": "normal", "beta": "beta",
    "kloptimal": "kl_optimal", "alignyourstepsxl": "ays_sdxl", "alignyourstepssdxl": "ays_sdxl",
    "alignyoursteps": "ays_sd15", "ddim": "ddim_uniform", "uniform": None, "automatic": None,
}  # fmt: skip


def _written(text: str) -> str:
    """A name in small letters, with "_" for spaces, without prefixes."""
    found = re.sub(r"\s+", "_", text.strip().lower().replace("++", "pp"))
    return re.sub(r"^(sample_|k_|k-)+", "", found)


def _plain(text: str) -> str:
    """A name without what does not matter in it."""
    return re.sub(r"(scheduler|gpu)$", "", _written(text).replace("_", ""))


_NAMES: dict[str, Known] = {}
for _names, _one in _TABLE.items():
    for _name in _names.split(";"):
        _NAMES[_written(_name)] = _one  # uni_pc and UniPC are two
        _NAMES.setdefault(_plain(_name), _one)
_NO_NAMES: dict[str, str] = {_plain(name): nearest for name, nearest in _REFUSED.items()}
_told: set[str] = set()


def alias(text: str) -> dict[str, Any]:
    """Return {"sampler": spec, "grid": name or None} for a sampler's name in another program.

    A grid word at its end (Karras, Exponential, Simple, Align Your Steps, ...) is the grid;
    "Automatic" is what A1111 chooses for the sampler. Differences from other programs are reported
    once, as a warning. Names of this project are returned unchanged.

    Raises ValueError for unknown names, with suggestions.
    """
    if registry.exists("sampler", text):
        return {"sampler": {"name": text}, "grid": None}
    name, grid, automatic = _split(text)
    if name.endswith("cfgpp") and name not in _NAMES:
        _warn_once(text, "that is the sampler with the guidance 'cfg_pp': give guidance = 'cfg_pp'")
        name = name.removesuffix("cfgpp").rstrip("-")
    if name in _NO_NAMES:
        raise ValueError(
            f"The sampler {text!r:.60} is not part of this project; the nearest is "
            f"{_NO_NAMES[name]!r}."
        )
    known = _NAMES.get(name)
    if known is None:
        own = {_plain(own): own for own in registry.names("sampler")}
        if name not in own:
            shown = {**{_plain(n): n.strip() for names in _TABLE for n in names.split(";")}, **own}
            near = difflib.get_close_matches(name, shown, 3, 0.4)
            hint = (
                f"the nearest are {', '.join(repr(shown[n]) for n in near)}"
                if near
                else ("`sampler list samplers` has the names")
            )
            raise ValueError(f"The sampler {text!r:.60} is not known; {hint}.")
        known = _known(own[name])
    if known.note:
        _warn_once(text, known.note)
    return {"sampler": dict(known.sampler), "grid": known.automatic if automatic else grid}


def _split(text: str) -> tuple[str, str | None, bool]:
    """(name, grid, whether A1111's automatic grid is meant) of a text."""
    for name in (_written(text), _plain(text)):
        if name in _NAMES or name in _NO_NAMES:
            return name, None, False
    written = _written(text)
    for word, grid in _GRIDS.items():
        pattern = "_?".join(map(re.escape, word))
        if (found := re.fullmatch(rf"(.+?)[_-]?{pattern}", written)) is not None:
            rest = found[1] if found[1] in _NAMES else _plain(found[1])
            return rest, grid, word == "automatic"
    return _plain(text), None, False


def _warn_once(text: str, note: str) -> None:
    """Warn of a name, once."""
    if text not in _told:
        _told.add(text)
        warnings.warn(f"The sampler {text!r:.60}: {note}.", stacklevel=3)


def _is_known(text: str) -> bool:
    """Return True for a name that `alias` resolves, or refuses with a reason."""
    name = _split(text)[0].removesuffix("cfgpp")
    if name in _NAMES or name in _NO_NAMES:
        return True
    return name in (_plain(own) for own in registry.names("sampler"))


def named(spec: Any) -> tuple[Any, str | None]:
    """(sampler under its name in this project, grid that the name includes or None) from any spec.

    A mapping's fields are kept over those of the name; an unknown name is left as it is. Raises
    ValueError for names that `alias` refuses.
    """
    given = dict(cast("Mapping[str, Any]", spec)) if isinstance(spec, Mapping) else {"name": spec}
    name = given.pop("name", None)
    if not isinstance(name, str) or registry.exists("sampler", name) or not _is_known(name):
        return cast("Any", spec), None
    found = alias(name)
    return {**found["sampler"], **given}, found["grid"]


@registry.resolver("sampler")
def _without_grid(spec: Mapping[str, Any]) -> Mapping[str, Any]:
    """The spec with a name of this project. Raises ValueError for a name that includes a grid."""
    found, grid = named(spec)
    if grid is not None:
        raise ValueError(
            f"{spec['name']!r:.60} names a grid, which is not accepted here; give the sampler "
            f"{found['name']!r}, and where a grid is taken {grid!r}."
        )
    return found
