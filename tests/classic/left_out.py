"""Classic classes without a recipe, and why, in one sentence each."""

from __future__ import annotations

_SIZED = "It has no tiny recipe here yet."
_NO_LOOP = "It has no denoising loop: it is one pass of a network."
_TEXT = "It makes text by discrete diffusion, which has no levels of noise."
_ONNX = "It runs exported ONNX networks, which cannot be intercepted; use the PyTorch class."
_OLD = "It is deprecated, and its encoders have no tiny recipe here yet."

_GROUPS = {
    _SIZED: "Kandinsky6SR Cosmos3Omni SanaWM",
    _NO_LOOP: "FluxPriorRedux LTXLatentUpsample LTX2LatentUpsample",
    _TEXT: "DiffusionGemma LLaDA2",
    _ONNX: """OnnxStableDiffusion OnnxStableDiffusionImg2Img OnnxStableDiffusionInpaint
        OnnxStableDiffusionUpscale StableDiffusionOnnx""",
    "It draws tokens of images, which is discrete diffusion without levels of noise.":
        "VQDiffusion",
    _OLD: """BlipDiffusion BlipDiffusionControlNet UniDiffuser ShapE ShapEImg2Img
        VersatileDiffusion VersatileDiffusionDualGuided VersatileDiffusionImageVariation
        VersatileDiffusionTextToImage""",
    "It decodes the latents of another pipeline by a diffusion inside its decoder, which has no "
    "prompt.": "LTX2VideoDiffusionDecode",
    "It asks its own scheduler for the steps of each stage of its pyramid, which no other has.":
        "HeliosPyramid",
    "It makes molecules with two schedulers for one network, neither of them called scheduler.":
        "RFD4Proteina",
    "It takes the latents of another pipeline, and no scheduler but its own, whose levels are not "
    "known.": "LTX2DFRTemporalRefine",
    "The class builds transforms of torchvision, which is not among this project's packages.":
        "OmniGen",
    "The class reads CLAP's embedding as a tensor, which transformers 5 gives in an output.":
        "MusicLDM",
    "The class asks its transformer for guidance_embeds, which Chroma's does not have.":
        "ChromaInpaint",
    "The class gives its own encode_prompt an argument that it does not take.":
        "EasyAnimateControl",
    "The class asks its autoencoder for cache_mag_vae, which it does not have.":
        "EasyAnimateInpaint",
    "It needs the package librosa.": "AudioDiffusion",
    "It needs the package opencv-python.": "ConsisID",
    "It needs the package note_seq.": "SpectrogramDiffusion",
}  # fmt: skip
LEFT_OUT = {f"{name}Pipeline": why for why, names in _GROUPS.items() for name in names.split()}
