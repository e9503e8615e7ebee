"""Loading and use of pipelines in practice: adapters, offloading, tiles, quantised modules,
compiled blocks, single files. All of it keeps working under the engine, the hook and the drop-in.
"""

import copy

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

import sampler
from sampler.models.options import compile_blocks
from tests import tiny

PROMPTS = ["a red fox", "two green apples"]
CFG = {"name": "cfg", "scale": 5.0}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder, a network of other weights in one file, and two adapters of the network."""
    root = tmp_path_factory.mktemp("models")
    pipe = tiny.sd()
    pipe.save_pretrained(root / "folder")
    save_file(tiny.sd(seed=1).unet.state_dict(), root / "network.safetensors")
    for number in (0, 1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number)
            config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
            other = tiny.sd()
            other.unet.add_adapter(config, adapter_name="a")
        layers = get_peft_model_state_dict(other.unet, adapter_name="a")
        StableDiffusionPipeline.save_lora_weights(root / f"lora_{number}", unet_lora_layers=layers)
    return root


def latents(engine, **options):
    chosen = {"steps": 3, "seeds": [7, 8], "guidance": CFG, "output": "latent", **options}
    return engine.generate(PROMPTS, **chosen).latents


def stock(pipe, output="latent", scale=5.0):
    return pipe(
        PROMPTS,
        num_inference_steps=3,
        guidance_scale=scale,
        generator=[torch.Generator().manual_seed(seed) for seed in (7, 8)],
        output_type=output,
    ).images


def keeps_working(pipe, wanted):
    """Engine, hook and drop-in scheduler over a pipeline whose stock latents are `wanted`."""
    assert torch.equal(latents(sampler.load(pipe)), wanted)
    with sampler.guide(pipe, CFG) as calls:
        assert torch.equal(stock(pipe, scale=7.7), wanted)
    assert calls.nfe == [6, 6]
    before = pipe.scheduler
    pipe.scheduler = sampler.scheduler("ddim", before)
    assert torch.equal(stock(pipe), wanted)
    pipe.scheduler = before
    assert torch.equal(stock(pipe), wanted)


def refuses(*words, error=sampler.SamplerError, **options):
    source = options.pop("source")
    with pytest.raises(error) as caught:
        sampler.load(source, **options)
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".") and len(text) < 500
    for word in words:
        assert word in text
    return text


def test_several_adapters_with_weights(files):
    paths = [files / "lora_0", files / "lora_1" / "pytorch_lora_weights.safetensors"]
    pipe = tiny.sd()
    for number, path in enumerate(paths):
        folder = path if path.is_dir() else path.parent
        pipe.load_lora_weights(folder, adapter_name=f"x{number}")
    pipe.set_adapters(["x0", "x1"], [0.5, 2.0])
    wanted = stock(copy.deepcopy(pipe))
    pairs = [(paths[0], 0.5), (str(paths[1]), 2.0)]
    for given in (pairs, dict(pairs)):
        engine = sampler.load(files / "folder", lora=given, device="cpu")
        assert torch.equal(latents(engine), wanted)
    once = sampler.load(files / "folder", lora=paths[0], device="cpu")
    assert not torch.allclose(latents(once), wanted, atol=1e-2)
    keeps_working(pipe, wanted)


def test_adapters_that_do_not_fit(files, tmp_path):
    tiny.sdxl().save_pretrained(tmp_path / "xl")
    refuses("does not fit", "architecture", source=tmp_path / "xl", lora=files / "lora_0")
    save_file({"unet.nowhere.to_q.lora_A.weight": torch.zeros(2, 8)}, tmp_path / "x.safetensors")
    refuses("without unet.nowhere", source=files / "folder", lora=tmp_path / "x.safetensors")
    refuses("does not exist", source=files / "folder", lora=tmp_path / "nothing")
    (tmp_path / "lora.bin").write_bytes(b"x")
    refuses("pickle", source=files / "folder", lora=tmp_path / "lora.bin")
    refuses("no effect", source=tiny.sd(), lora=files / "lora_0", error=ValueError)


def test_a_network_in_a_single_file(files, tmp_path):
    source, folder = files / "network.safetensors", files / "folder"
    pipe = tiny.sd()
    pipe.unet = tiny.sd(seed=1).unet
    for config in (folder, str(folder)):
        engine = sampler.load(source, config=config, device="cpu")
        assert torch.equal(latents(engine), stock(copy.deepcopy(pipe)))
    half = sampler.load(source, config=folder, dtype="bfloat16", device="cpu")
    assert half.pipeline.dtype == torch.bfloat16
    refuses("holds weights only", "config", source=source)
    refuses("does not exist", source=tmp_path / "none.safetensors", config=folder)
    refuses("config applies to", source=folder, config=folder, error=ValueError)
    refuses("variant applies to", source=source, config=folder, variant="x", error=ValueError)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\xff" * 64)
    refuses("not an intact safetensors", source=broken, config=folder)


def test_a_whole_checkpoint_is_read_by_diffusers(files, tmp_path, monkeypatch):
    """Its original layout is diffusers' to convert; a VAE's weights tell it from a network's."""
    whole = tmp_path / "whole.safetensors"
    save_file({"first_stage_model.x": torch.zeros(1)}, whole)
    asked = []

    def read(path, **options):
        asked.append((path, options))
        return tiny.sd()

    monkeypatch.setattr(StableDiffusionPipeline, "from_single_file", read)
    sampler.load(whole, config=files / "folder", device="cpu")
    options = {"local_files_only": True, "torch_dtype": torch.float32}
    assert asked == [(str(whole), {"config": str(files / "folder"), **options})]


def test_a_single_file_that_is_a_pickle_is_not_opened(files, tmp_path):
    mark = tmp_path / "was_run"

    class Payload:
        def __reduce__(self):
            return (open, (str(mark), "w"))

    for suffix in ("ckpt", "pt", "pth", "bin"):
        path = tmp_path / f"model.{suffix}"
        torch.save({"weight": Payload()}, path)
        refuses("pickle", "safetensors", source=path, config=files / "folder")
    assert not mark.exists()


def test_variants(files, tmp_path):
    tiny.sd().to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    engine = sampler.load(tmp_path / "half", variant="fp16", dtype="float16", device="cpu")
    assert engine.pipeline.dtype == torch.float16
    refuses("variant 'fp16'", "it has none", source=files / "folder", variant="fp16")
    refuses("variant 'bf16'", "it has fp16", source=tmp_path / "half", variant="bf16")


def test_offloaded_pipelines(files):
    wanted = latents(sampler.load(files / "folder", device="cpu"))
    engine = sampler.load(files / "folder", offload="model", device="cpu")
    assert torch.equal(latents(engine), wanted)
    hooked = [
        part for part in engine.pipeline.pipe.components.values() if hasattr(part, "_hf_hook")
    ]
    assert len(hooked) >= 3
    keeps_working(engine.pipeline.pipe, wanted)
    refuses("must be one of model", source=files / "folder", offload="disk", error=ValueError)


def test_offloading_by_accelerate(files):
    from accelerate import cpu_offload

    pipe = tiny.sd()
    wanted = stock(copy.deepcopy(pipe))
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        cpu_offload(part, execution_device=torch.device("cpu"))
    assert pipe.unet.device.type == "meta"
    keeps_working(pipe, wanted)


def test_tiles_and_slices_of_the_vae(files):
    engine = sampler.load(files / "folder", vae_tiling=True, vae_slicing=True, device="cpu")
    pipe = engine.pipeline.pipe
    assert pipe.vae.use_tiling and pipe.vae.use_slicing
    whole = latents(sampler.load(files / "folder", device="cpu"), output="tensor")
    pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size = 8, 16  # small enough to tile
    tiled = engine.generate(PROMPTS, seeds=[7, 8], steps=3, guidance=CFG, output="tensor").images
    assert torch.equal(tiled, stock(pipe, "pt"))
    plain = sampler.load(files / "folder", device="cpu").pipeline.decode(whole)
    assert not torch.allclose(tiled, plain, atol=1e-3)
    keeps_working(pipe, stock(copy.deepcopy(pipe)))


@pytest.mark.filterwarnings("ignore")
def test_quantised_modules():
    pipe = tiny.sd()
    full = stock(copy.deepcopy(pipe))
    quantised = torch.ao.quantization.quantize_dynamic(
        pipe.unet, {torch.nn.Linear}, dtype=torch.qint8
    )
    pipe.unet = quantised
    wanted = stock(pipe)
    assert not torch.equal(wanted, full)
    keeps_working(pipe, wanted)


def test_compiled_blocks_have_no_breaks_and_are_compiled_once():
    from torch._dynamo import config
    from torch._dynamo.utils import counters

    pipe = tiny.sd()
    wanted = stock(copy.deepcopy(pipe))
    torch._dynamo.reset()
    counters.clear()
    compile_blocks(pipe.unet, backend="eager")
    with config.patch(error_on_recompile=True):
        latents(sampler.load(pipe), steps=5)
        graphs = counters["stats"]["unique_graphs"]
        keeps_working(pipe, wanted)
    assert not counters["graph_break"] and graphs >= 1
    assert counters["stats"]["unique_graphs"] == graphs
    torch._dynamo.reset()


def test_compile_is_asked_for_at_load(files):
    engine = sampler.load(files / "folder", compile=True, device="cpu")
    blocks = [m for m in engine.pipeline.network.modules() if m._compiled_call_impl is not None]
    assert {type(block).__name__ for block in blocks} == {"BasicTransformerBlock"}
    bare = torch.nn.Linear(2, 2)
    with pytest.raises(sampler.SamplerError, match="no repeated blocks"):
        compile_blocks(bare)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["model", "sequential"])
def test_offloading_on_a_gpu(files, kind):
    wanted = latents(sampler.load(files / "folder"))
    engine = sampler.load(files / "folder", offload=kind)
    assert torch.allclose(latents(engine), wanted, atol=1e-4)


@pytest.mark.gpu
def test_compiled_blocks_on_a_gpu(files):
    wanted = latents(sampler.load(files / "folder"))
    engine = sampler.load(files / "folder", compile=True)
    assert torch.allclose(latents(engine), wanted, atol=1e-2)
