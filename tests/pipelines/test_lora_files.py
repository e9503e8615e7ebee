"""LoRA files as other tools write them: applied as the stock pipeline does, or refused by name."""

import json

import pytest
import torch
from safetensors.torch import save_file

import sampler
from sampler.cli import main
from sampler.core.errors import ModelError
from sampler.models.lora import load_lora, unload_lora
from tests import tiny

NETWORK = ("to_q", "to_k", "to_v", "to_out.0")
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
PEFT_TEXT = "text_encoder.text_model"


def layers(network, endings):
    return [name for name, _ in network.named_modules() if name.endswith(endings)]


def factors(network, names, rank=2, seed=0):
    """{layer: (A, B)} with random values."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name in names:
        shape = network.get_submodule(name).weight.shape
        a = torch.randn(rank, *shape[1:], generator=generator)
        b = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator)
        found[name] = (0.3 * a, 0.3 * b)
    return found


PIPE = tiny.sd()
XL = tiny.sdxl()
U = factors(PIPE.unet, layers(PIPE.unet, NETWORK))
T = factors(PIPE.text_encoder, layers(PIPE.text_encoder, TEXT), seed=1)
CONV = factors(PIPE.unet, [n for n in layers(PIPE.unet, "conv1") if "resnets" in n], 3, seed=2)
FIRST = next(iter(U))


def peft(prefix, pairs):
    names = (("A", 0), ("B", 1))
    return {f"{prefix}.{n}.lora_{x}.weight": pair[k] for n, pair in pairs.items() for x, k in names}


def kohya(prefix, pairs, alpha=None):
    tensors = {}
    for name, (a, b) in pairs.items():
        key = f"{prefix}_{name.replace('.', '_')}"
        tensors |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b}
        if alpha is not None:
            value = alpha(name) if callable(alpha) else alpha
            tensors[f"{key}.alpha"] = torch.tensor(float(value))
    return tensors


def older(pairs):
    """The layout of diffusers before peft: layers of attention processors."""
    tensors = {}
    for name, (a, b) in pairs.items():
        head, _, leaf = name.partition(".to_")
        key = f"unet.{head}.processor.to_{leaf.removesuffix('.0')}_lora"
        tensors |= {f"{key}.down.weight": a, f"{key}.up.weight": b}
    return tensors


def header(prefix, pairs, alpha):
    targets = sorted(pairs)
    config = {"r": 2, "lora_alpha": alpha, "target_modules": targets}
    return {f"{prefix}.{key}": value for key, value in config.items()}


def sizes(name):
    return PIPE.unet.get_submodule(name).weight.shape


def half(tensors):
    return {key: value.half() for key, value in tensors.items()}


K = kohya("lora_unet", U, 1)
KT = kohya("lora_te_text_model", T, 1)
MAGNITUDES = {f"unet.{n}.lora_magnitude_vector.weight": torch.ones(sizes(n)[0]) for n in U}
APPLIED = {
    "diffusers, UNet": peft("unet", U),
    "diffusers, UNet and text encoder": peft("unet", U) | peft(PEFT_TEXT, T),
    "diffusers, text encoder alone": peft(PEFT_TEXT, T),
    "diffusers, two ranks": peft("unet", U | factors(PIPE.unet, list(U)[:3], 4)),
    "diffusers, float16": half(peft("unet", U) | peft(PEFT_TEXT, T)),
    "older diffusers": older(U),
    "peft, DoRA": peft("unet", U) | MAGNITUDES,
    "kohya, alpha": K,
    "kohya, no alpha": kohya("lora_unet", U),
    "kohya, float alpha": kohya("lora_unet", U, 0.7),
    "kohya, UNet and text encoder": K | KT,
    "kohya, text encoder alone": KT,
    "kohya, float16": half(K | KT),
    "kohya, convolutions": kohya("lora_unet", U | CONV, 1),
}
HEADED = {
    "header, alpha": ({"unet": U}, 1),
    "header, float alpha": ({"unet": U}, 0.7),
    "header, text encoder": ({"unet": U, "text_encoder": T}, 3),
}
LOHA = {
    f"lora_unet_{n.replace('.', '_')}.hada_{x}": pair[k].clone()
    for n, pair in U.items()
    for x, k in (("w1_a", 1), ("w1_b", 0), ("w2_a", 1), ("w2_b", 0))
}
LOKR = {
    f"lora_unet_{n.replace('.', '_')}.lokr_{x}": torch.ones(shape)
    for n in U
    for x, shape in (("w1", (2, 2)), ("w2", (sizes(n)[0] // 2, sizes(n)[1] // 2)))
}
B = f"unet.{FIRST}.lora_B.weight"
DOWN = f"lora_unet_{FIRST.replace('.', '_')}"
XL_U = factors(XL.unet, layers(XL.unet, NETWORK))
REFUSED = {
    "kohya, DoRA": (
        K | {k.replace(".alpha", ".dora_scale"): torch.ones(4, 1) for k in K if "alpha" in k},
        "a DoRA",
    ),
    "LoHa": (LOHA, "a LoHa"),
    "LoKr": (LOKR, "a LoKr"),
    "a middle factor": (K | {f"{DOWN}.lora_mid.weight": torch.ones(2, 2, 3, 3)}, "middle factor"),
    "bias of another tool": (K | {f"{DOWN}.diff_b": torch.ones(16)}, f"{DOWN}.diff_b"),
    "peft without prefixes": (
        {k.replace("unet.", "base_model.model."): v for k, v in peft("unet", U).items()},
        "library peft",
    ),
    "no prefixes": (
        {k.removeprefix("unet."): v for k, v in peft("unet", U).items()},
        "down_blocks.1",
    ),
    "a layer of nowhere": (
        peft("unet", U) | peft("unet", {"nowhere": (torch.ones(2, 4), torch.ones(4, 2))}),
        "unet.nowhere.lora_A.weight",
    ),
    "a second text encoder": (peft("unet", U) | peft("text_encoder_2", T), "text_encoder_2."),
    "another rank": (peft("unet", U) | {B: torch.randn(sizes(FIRST)[0], 3)}, FIRST),
    "half of a pair": ({k: v for k, v in peft("unet", U).items() if k != B}, B),
    "kohya, half of a pair": (
        {k: v for k, v in K.items() if k != f"{DOWN}.lora_up.weight"},
        f"{DOWN}.lora_up.weight",
    ),
    "nan": (peft("unet", U) | {B: torch.full((sizes(FIRST)[0], 2), torch.nan)}, "nan or infinity"),
    "infinity": (
        peft("unet", U) | {B: torch.full((sizes(FIRST)[0], 2), torch.inf).half()},
        "nan or infinity",
    ),
    "another architecture": (peft("unet", XL_U), "another architecture"),
    "kohya, another architecture": (
        kohya("lora_unet", XL_U, 1) | kohya("lora_te2_text_model", T, 1),
        "another architecture",
    ),
    "a transformer": (
        peft("transformer", {"blocks.0.attn.to_q": (torch.ones(2, 4), torch.ones(4, 2))}),
        "transformer.blocks.0",
    ),
}


def write(tensors, path, metadata=None):
    text = None if metadata is None else {"lora_adapter_metadata": json.dumps(metadata)}
    save_file({key: value.clone().contiguous() for key, value in tensors.items()}, path, text)
    return path


def images(engine):
    options = {"steps": 2, "seeds": 5, "guidance": {"name": "cfg", "scale": 4.0}}
    return engine.generate(["a dog"], output="tensor", **options).images


def by_stock(path, weight=1.0):
    """Images of a pipeline into which diffusers loaded the file."""
    pipe = tiny.sd()
    pipe.load_lora_weights(
        str(path.parent), weight_name=path.name, adapter_name="x", local_files_only=True
    )
    pipe.set_adapters(["x"], [weight])
    return images(sampler.load(pipe))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("model")
    tiny.sd().save_pretrained(root)
    return root


@pytest.fixture(scope="module")
def bare(folder):
    return images(sampler.load(folder, device="cpu"))


def same_as_stock(path, folder, bare):
    engine = sampler.load(folder, lora=path, device="cpu")
    found, wanted = images(engine), by_stock(path)
    assert torch.equal(found, wanted) and not torch.allclose(found, bare, atol=1e-3)
    named = engine.pipeline.pipe.unet.named_parameters()
    assert not any(parameter.requires_grad for name, parameter in named if "lora_" in name)
    weighted = sampler.load(folder, lora=(path, 0.5), device="cpu")
    assert torch.equal(images(weighted), by_stock(path, 0.5))
    engine = sampler.load(tiny.sd())
    load_lora(engine, path)
    assert torch.equal(images(engine), wanted)
    unload_lora(engine)
    assert torch.equal(images(engine), bare)


@pytest.mark.parametrize("form", APPLIED)
def test_every_form_is_applied_as_by_the_stock_pipeline(tmp_path, folder, bare, form):
    same_as_stock(write(APPLIED[form], tmp_path / "lora.safetensors"), folder, bare)


@pytest.mark.parametrize("form", HEADED)
def test_the_header_decides_alpha(tmp_path, folder, bare, form):
    parts, alpha = HEADED[form]
    tensors, config = {}, {}
    for prefix, pairs in parts.items():
        tensors |= peft(prefix, pairs)
        config |= header(prefix, pairs, alpha)
    same_as_stock(write(tensors, tmp_path / "lora.safetensors", config), folder, bare)


def test_each_layer_has_its_own_alpha(tmp_path, folder, bare):
    """The stock loader takes one alpha for all attention layers of such a file."""

    def alpha(name):
        return 1.0 if "to_q" in name else 2.5

    path = write(kohya("lora_unet", U | CONV, alpha), tmp_path / "lora.safetensors")
    pipe = tiny.sd()
    with torch.no_grad():
        for name, (a, b) in (U | CONV).items():
            weight = pipe.unet.get_submodule(name).weight
            change = (b.flatten(1) @ a.flatten(1)).view(weight.shape)
            weight += alpha(name) / a.shape[0] * change
    found = images(sampler.load(folder, lora=path, device="cpu"))
    assert torch.allclose(found, images(sampler.load(pipe)), atol=1e-4)
    assert not torch.allclose(found, bare, atol=1e-3)


@pytest.mark.parametrize("form", REFUSED)
def test_what_cannot_be_applied_is_refused_by_name(tmp_path, folder, form):
    tensors, words = REFUSED[form]
    path = write(tensors, tmp_path / "lora.safetensors")
    engine = sampler.load(tiny.sd())
    modules = [name for name, _ in engine.pipeline.pipe.unet.named_modules()]
    for load in (
        lambda: sampler.load(folder, lora=path, device="cpu"),
        lambda: load_lora(engine, path),
    ):
        with pytest.raises(ModelError) as caught:
            load()
        text = str(caught.value)
        assert words in text and str(path) in text
        assert "\n" not in text and len(text) < 600
    assert [name for name, _ in engine.pipeline.pipe.unet.named_modules()] == modules


@pytest.mark.parametrize("form", ["kohya, UNet and text encoder", "LoHa"])
def test_the_command_line_does_the_same(tmp_path, folder, form, capsys):
    tensors = APPLIED.get(form) or REFUSED[form][0]
    path = write(tensors, tmp_path / "lora.safetensors")
    line = ["generate", "a dog", "--model", str(folder), "--lora", f"{path}:0.5", "--steps", "2"]
    line += ["--seed", "5", "--sampler", "ddim", "--guidance", "cfg", "--device", "cpu", "-q"]
    code = main([*line, "--set", "guidance.scale=4.0", "-o", str(tmp_path / "run")])
    if form == "LoHa":
        assert code == 6 and "a LoHa" in capsys.readouterr().err
        return
    assert code == 0
    from PIL import Image

    (file,) = (tmp_path / "run" / "images").glob("*.png")
    wanted = by_stock(path, 0.5)[0].permute(1, 2, 0).mul(255).round().to(torch.uint8)
    with Image.open(file) as image:
        assert torch.equal(torch.tensor(list(image.getdata())).view(wanted.shape), wanted.long())


def test_a_folder_with_several_files_is_refused(tmp_path, folder):
    for name in "ab":
        write(APPLIED["kohya, alpha"], tmp_path / f"{name}.safetensors")
    with pytest.raises(ModelError, match=r"several safetensors files \(a\.safetensors, b"):
        sampler.load(folder, lora=tmp_path, device="cpu")
    with pytest.raises(ValueError, match="must be finite"):
        sampler.load(folder, lora=(tmp_path / "a.safetensors", float("nan")), device="cpu")
