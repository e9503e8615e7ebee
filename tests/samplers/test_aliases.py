"""Names of other programs for samplers, and the places that take them."""

import warnings

import pytest
import torch

import sampler
from sampler import registry
from sampler.samplers import aliases
from tests import tiny

# the table of names, "; " apart -> our spec; A1111's automatic grid
TABLE = [
    ("Euler; euler; EulerDiscrete; EulerDiscreteScheduler; FlowMatchEuler", {"name": "ddim"}, None),
    ("Euler a; euler_ancestral; EulerAncestralDiscrete; euler_a",
     {"name": "euler_ancestral"}, None),
    ("DDIM; ddim", {"name": "ddim"}, None),
    ("DDPM; ddpm", {"name": "ddim", "eta": 1.0}, None),
    ("Heun; heun; HeunDiscrete; FlowMatchHeun", {"name": "heun"}, None),
    ("LMS; lms; LMSDiscrete", {"name": "ab", "order": 4, "steps": "variable"}, None),
    ("PLMS; ipndm; PNDM; IPNDM", {"name": "ab", "order": 4}, None),
    ("DPM++ 2M; dpmpp_2m; DPMSolverMultistep; dpm++2m", {"name": "dpmpp_2m"}, "karras"),
    (
        "DPM++ 2M SDE; dpmpp_2m_sde; dpmpp_2m_sde_gpu; sde-dpmsolver++; dpm++2m_sde; "
        "dpm++2m_sde_bt",
        {"name": "dpmpp_2m_sde"}, "exponential",
    ),
    (
        "DPM++ 2M SDE Heun; dpmpp_2m_sde_heun; dpmpp_2m_sde_heun_gpu",
        {"name": "dpmpp_2m_sde", "solver_type": "heun"}, "exponential",
    ),
    ("DPM++ 3M SDE; dpmpp_3m_sde; dpmpp_3m_sde_gpu", {"name": "dpmpp_3m_sde"}, "exponential"),
    ("DPM++ SDE; dpmpp_sde; dpmpp_sde_gpu; DPMSolverSDE; DPMSolverSinglestep",
     {"name": "dpmpp_sde"}, "karras"),
    ("DPM++ 2S a; dpmpp_2s_ancestral; dpm++2s_a", {"name": "dpmpp_2s", "eta": 1.0}, "karras"),
    ("dpmpp_2s", {"name": "dpmpp_2s"}, "karras"),
    ("UniPC; UniPCMultistep", {"name": "unipc"}, None),
    ("uni_pc", {"name": "unipc", "order": 3, "variant": "bh1", "clock": "auto"}, None),
    ("uni_pc_bh2", {"name": "unipc", "order": 3, "variant": "bh2", "clock": "auto"}, None),
    ("DEIS; deis; DEISMultistep", {"name": "deis"}, None),
    ("res_multistep; RES-Multistep 2M; res_2m", {"name": "res_multistep"}, None),
    ("res_multistep_ancestral", {"name": "res_multistep", "eta": 1.0}, None),
    ("er_sde; ER-SDE 3M", {"name": "er_sde"}, None),
    ("ER-SDE", {"name": "er_sde", "order": 1}, None),
    ("ER-SDE 2M", {"name": "er_sde", "order": 2}, None),
    ("sa_solver; SASolver", {"name": "sa_solver"}, None),
    ("sa_solver_pece", {"name": "sa_solver", "pece": True}, None),
    ("seeds_2", {"name": "res_2s", "solver_type": "phi_1", "eta": 1.0}, None),
    ("exp_heun_2_x0", {"name": "res_2s", "r": 1.0}, None),
    ("exp_heun_2_x0_sde", {"name": "res_2s", "r": 1.0, "eta": 1.0}, None),
    ("res_2s", {"name": "res_2s"}, None),
    ("gradient_estimation; euler_ge", {"name": "gradient_estimation"}, None),
    ("LCM; lcm; FlowMatchLCM", {"name": "consistency"}, None),
]  # fmt: skip
NAMES = [(n.strip(), spec, auto) for names, spec, auto in TABLE for n in names.split(";")]
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(("name", "spec", "automatic"), NAMES)
def test_names_people_know(name, spec, automatic):
    right = sampler.build("sampler", spec)
    spaced = name.replace("_", " ")
    for text in (name, f"  {name.upper()} ", f"k_{name}", f"sample_{name}", spaced):
        found = sampler.alias(text)
        assert set(found) == {"sampler", "grid"} and found["grid"] is None
        assert sampler.build("sampler", found["sampler"]) == right
        assert found["sampler"]["name"] in registry.names("sampler")
        assert sampler.build("sampler", text) == right
    assert sampler.alias(f"{name} Karras") == {**sampler.alias(name), "grid": "karras"}
    assert sampler.alias(f"{name} Automatic")["grid"] in (automatic, None)


@pytest.mark.parametrize(("word", "grid"), [
    ("Karras", "karras"), ("Exponential", "exponential"), ("Polyexponential", "polyexponential"),
    ("SGM Uniform", "sgm_uniform"), ("Simple", "simple"), ("Normal", "normal"), ("Beta", "beta"),
    ("KL Optimal", "kl_optimal"), ("Align Your Steps", "ays_sd15"), ("DDIM", "ddim_uniform"),
    ("Uniform", None),
])  # fmt: skip
def test_a_grid_word_is_cut_off(word, grid):
    for text in (f"DPM++ 2M {word}", f"dpmpp_2m_{word.lower().replace(' ', '_')}"):
        assert sampler.alias(text) == {"sampler": {"name": "dpmpp_2m"}, "grid": grid}
    assert sampler.alias("DPM++ 2M Automatic")["grid"] == "karras"
    assert sampler.alias("Euler a Automatic")["grid"] is None


@pytest.mark.parametrize("name", registry.names("sampler"))
def test_our_own_names_stand_for_themselves(name):
    assert sampler.alias(name) == {"sampler": {"name": name}, "grid": None}


@pytest.mark.parametrize(("name", "nearest"), [
    ("Restart", "heun"), ("DPM fast", "dpmpp_2s"), ("DPM adaptive", "dpmpp_2m"), ("DPM2", "heun"),
    ("DPM2 a", "dpmpp_2s"), ("DPM2 a Karras", "dpmpp_2s"), ("dpm_2", "heun"), ("seeds_3", "res_2s"),
    ("heunpp2", "heun"),
])  # fmt: skip
def test_what_is_left_out_is_refused_with_the_nearest(name, nearest):
    for refuse in (sampler.alias, lambda text: sampler.build("sampler", text)):
        with pytest.raises(ValueError, match=f"is not part of .*; the nearest is '{nearest}'"):
            refuse(name)


def test_unknown_names_suggest_the_nearest_three():
    with pytest.raises(ValueError, match="the nearest are 'dpmpp_2m', 'dpmpp_2s', ") as error:
        sampler.alias("DPM++ 4M")
    assert str(error.value).count("'") == 8


def test_a_name_with_another_meaning_elsewhere_says_so_once(monkeypatch):
    monkeypatch.setattr(aliases, "_told", set())
    for text in ("DEIS", "dpmpp_2m_cfg_pp", "DPM++ 3M SDE"):
        with pytest.warns(UserWarning, match="sampler") as told:
            sampler.alias(text)
        assert len(told) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sampler.alias(text)
    assert sampler.alias("euler_ancestral_cfg_pp")["sampler"] == {"name": "euler_ancestral"}


# the places that take a sampler


def test_a_grid_in_a_name_needs_a_place_for_it():
    with pytest.raises(ValueError, match="'DPM[+][+] 2M Karras' names a grid"):
        sampler.build("sampler", "DPM++ 2M Karras")


def test_fields_are_kept_over_those_of_the_name():
    built = sampler.build("sampler", {"name": "DPM++ 2S a", "eta": 0.5})
    assert built == sampler.build("sampler", {"name": "dpmpp_2s", "eta": 0.5})


def test_generate_and_drop_ins_take_names_with_their_grids():
    pipe = tiny.sd("v")
    engine = sampler.load(pipe)
    call = {"seeds": 1, "steps": 3, "output": "latent", "guidance": "none"}
    ours = engine.generate("a fox", sampler="DPM++ 2M Karras", **call)
    assert ours.config["sampler"]["name"] == "dpmpp_2m" and ours.config["grid"] == "karras"
    plain = engine.generate("a fox", sampler="dpmpp_2m", grid="karras", **call)
    assert torch.equal(ours.latents, plain.latents)
    explicit = engine.generate("a fox", sampler="DPM++ 2M Karras", grid="beta", **call)
    assert explicit.config["grid"] == "beta"
    drop = sampler.scheduler("DPM++ 2M Karras", pipe.scheduler)
    assert drop.config["grid"] == "karras" and drop.config["sampler"]["name"] == "dpmpp_2m"
