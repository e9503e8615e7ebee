"""IP-Adapters of Flux and Stable Diffusion 3: the engine makes the images of the stock pipeline."""

import pytest
import torch
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterTimeImageProjection
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import sampler
from tests import tiny
from tests.guidance.stock_hosted import picture

pytestmark = pytest.mark.filterwarnings("ignore")
WIDTH, STEPS = 12, 4
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
          "num_attention_heads": 2, "image_size": 32, "patch_size": 16}  # fmt: skip
CFG = {"name": "cfg", "scale": 3.0}


def save_flux(folder, pipe, seed):
    """An adapter under the names of XLabs, and its image encoder."""
    torch.manual_seed(seed)
    CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION, projection_dim=WIDTH)).save_pretrained(
        folder / "image_encoder"
    )
    network = pipe.transformer
    joint, inner = network.config.joint_attention_dim, network.inner_dim
    sizes = {"proj.weight": (4 * joint, WIDTH), "proj.bias": (4 * joint,), "norm.weight": (joint,),
             "norm.bias": (joint,)}  # fmt: skip
    tensors = {f"ip_adapter_proj_model.{k}": torch.randn(v) for k, v in sizes.items()}
    for k in range(network.config.num_layers):
        for part in "kv":
            name = f"double_blocks.{k}.processor.ip_adapter_double_stream_{part}_proj"
            tensors[f"{name}.weight"] = torch.randn(inner, joint)
            tensors[f"{name}.bias"] = torch.randn(inner)
    save_file(tensors, folder / "ip_adapter.safetensors")


def save_sd3(folder, pipe, seed):
    torch.manual_seed(seed)
    SiglipVisionModel(SiglipVisionConfig(**VISION)).save_pretrained(folder / "image_encoder")
    network = pipe.transformer
    inner = network.config.attention_head_dim * network.config.num_attention_heads
    projection = IPAdapterTimeImageProjection(
        embed_dim=16, output_dim=inner, hidden_dim=64, heads=1, num_queries=4, timestep_in_dim=32
    )
    tensors = {f"image_proj.{k}": v for k, v in projection.state_dict().items()}
    for k in range(len(network.attn_processors)):
        layer = SD3IPAdapterJointAttnProcessor2_0(
            inner, inner, network.config.attention_head_dim, timesteps_emb_dim=64
        )
        tensors |= {f"ip_adapter.{k}.{name}": 2 * v for name, v in layer.state_dict().items()}
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "ip_adapter.safetensors")


FAMILIES = {
    "flux": (tiny.flux, save_flux, {"negative_prompt": "ugly", "guidance_scale": 1.0},
             "true_cfg_scale"),
    "sd3": (tiny.sd3, save_sd3, {"negative_prompt": "ugly"}, "guidance_scale"),
}  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """Name, folder of the model, folders of two adapters."""
    root = tmp_path_factory.mktemp(request.param)
    build, save, _, _ = FAMILIES[request.param]
    pipe = build()
    pipe.save_pretrained(root / "model")
    for seed in (1, 2):
        (root / str(seed)).mkdir()
        save(root / str(seed), pipe, seed)
    return request.param, root


def stock(name, engine, seeds=(1,), prompts=("a fox",), **more):
    """Latents of the stock call over the parts of an engine's pipeline."""
    _, _, call, scale = FAMILIES[name]
    call = {**call, scale: CFG["scale"], "height": 32, "width": 32, **more}
    call["negative_prompt"] = [call["negative_prompt"]] * len(prompts)
    seeds = [torch.Generator().manual_seed(seed) for seed in seeds]
    return engine.pipeline.pipe(
        [*prompts], generator=seeds, num_inference_steps=STEPS, output_type="latent", **call
    ).images


def generated(engine, prompt="a fox", seeds=1, **inputs):
    return engine.generate(
        prompt, seeds=seeds, steps=STEPS, sampler="ddim", guidance=CFG, negative="ugly",
        height=32, width=32, output="latent", inputs=inputs,
    ).latents  # fmt: skip


def apart(a, b):
    return float((a - b).abs().max() / b.abs().max())


def test_an_adapter_is_that_of_the_stock_pipeline(family):
    name, root = family
    engine = sampler.load(root / "model", device="cpu", ip_adapter={root / "1": 0.7})
    assert engine.hosted
    found = generated(engine, ip_adapter_image=picture(1))
    build, _, _, _ = FAMILIES[name]
    pipe = type(build()).from_pretrained(root / "model")
    if name == "flux":
        pipe.load_ip_adapter(
            str(root / "1"), weight_name="ip_adapter.safetensors",
            image_encoder_pretrained_model_name_or_path=str(root / "1" / "image_encoder"),
            image_encoder_dtype=torch.float32,
        )  # fmt: skip
    else:
        pipe.register_modules(
            image_encoder=SiglipVisionModel.from_pretrained(root / "1" / "image_encoder"),
            feature_extractor=engine.pipeline.pipe.feature_extractor,
        )
        pipe.load_ip_adapter(
            str(root / "1"), weight_name="ip_adapter.safetensors", image_encoder_folder=None
        )
    pipe.set_ip_adapter_scale(0.7)
    plain = type("Engine", (), {"pipeline": type("P", (), {"pipe": pipe})})
    wanted = stock(name, plain, ip_adapter_image=picture(1))
    assert apart(found, wanted) <= 1e-5
    assert apart(generated(engine, ip_adapter_image=picture(2)), wanted) > 1e-3
    other = sampler.load(root / "model", device="cpu", ip_adapter={root / "1": 0.2})
    assert apart(generated(other, ip_adapter_image=picture(1)), wanted) > 1e-3


def test_rows_do_not_depend_on_their_batch(family):
    _, root = family
    engine = sampler.load(root / "model", device="cpu", ip_adapter=root / "1")
    both = generated(engine, ["a fox", "a hen"], [1, 2], ip_adapter_image=picture(1))
    for row, (prompt, seed) in enumerate((("a fox", 1), ("a hen", 2))):
        one = generated(engine, prompt, seed, ip_adapter_image=picture(1))
        assert apart(both[row : row + 1], one) <= 1e-5
    images = [picture(1), picture(2)]
    each = generated(engine, ["a fox", "a fox"], [1, 1], ip_adapter_image=images)
    assert apart(each[:1], both[:1]) <= 1e-5 and apart(each[1:], both[:1]) > 1e-3


def test_several_adapters(family):
    name, root = family
    given = {root / "1": 0.5, root / "2": 1.0}
    if name == "sd3":
        with pytest.raises(sampler.SamplerError, match="takes one IP-Adapter, not 2"):
            sampler.load(root / "model", device="cpu", ip_adapter=given)
        return
    engine = sampler.load(root / "model", device="cpu", ip_adapter=given)
    images = [picture(1), picture(2)]
    found = generated(engine, ip_adapter_image=images)
    assert apart(found, stock(name, engine, ip_adapter_image=images)) <= 1e-5
    assert apart(generated(engine, ip_adapter_image=images[::-1]), found) > 1e-3


def test_adapters_of_other_networks_and_missing_images_are_refused(family, tmp_path):
    _, root = family
    tensors = load_file(root / "1" / "ip_adapter.safetensors")
    key, value = (
        next(k for k in tensors if k.endswith((f"_{part}_proj.weight", f"to_{part}_ip.weight")))
        for part in "kv"
    )
    files = {
        "half": ({k: v for k, v in tensors.items() if k != value}, "of another network"),
        "wide": ({**tensors, key: torch.cat([tensors[key]] * 2)}, "cannot be loaded"),
    }
    for file, (content, words) in files.items():
        (tmp_path / file).mkdir()
        save_file(content, tmp_path / file / "ip.safetensors")
        (tmp_path / file / "image_encoder").symlink_to(root / "1" / "image_encoder")
        with pytest.raises(sampler.SamplerError, match=words):
            sampler.load(root / "model", device="cpu", ip_adapter=tmp_path / file)
    engine = sampler.load(root / "model", device="cpu", ip_adapter=root / "1")
    with pytest.raises(ValueError, match="needs an image: give the input 'ip_adapter_image'"):
        generated(engine)
