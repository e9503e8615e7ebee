"""Classic classes without a recipe, and why, in one sentence each."""

from __future__ import annotations

_TORCHVISION = "Its processor needs torchvision, which is not among this project's packages."
_AUDIO = "Its text and sound encoders have no tiny recipe here yet."
_ENCODER = "Its encoders or networks have no tiny recipe here yet."
_NO_LOOP = "It has no denoising loop: it is one pass of a network."
_TEXT = "It makes text by discrete diffusion, which has no levels of noise."
_LTX2 = "It denoises video and sound, and its parts have no tiny recipe here yet."
_ONNX = "It runs exported ONNX networks, which cannot be intercepted; use the PyTorch class."
_OLD = "It is deprecated, and its encoders have no tiny recipe here yet."
_STAGES = "It has several networks with a scheduler each and none of its own to take steps with."

_GROUPS = {
    _TORCHVISION: """BriaFibo2 DreamLite DreamLiteMobile JoyImageEdit JoyImageEditPlus
        NucleusMoEImage OmniGen QwenImage21 QwenImageLayered ZImageOmni GlmImage
        Kandinsky6TI2VA""",
    _AUDIO: """AceStep AudioLDM AudioLDM2 LongCatAudioDiT MusicLDM StableAudio StableAudio3
        StableAudio3AudioToAudio StableAudio3Inpaint DanceDiffusion""",
    _ENCODER: """BriaFiboEdit Cosmos3Omni Cosmos2_5_PredictBase Cosmos2_5_Transfer
        SanaWM HeliosPyramid""",
    _NO_LOOP: "FluxPriorRedux LTXLatentUpsample LTX2LatentUpsample LTX2VideoDiffusionDecode",
    _TEXT: "DiffusionGemma LLaDA2",
    _LTX2: """LTX2 LTX2Condition LTX2DFR LTX2DFRTemporalRefine LTX2HDR LTX2ImageToVideo
        LTX2InContext""",
    _ONNX: """OnnxStableDiffusion OnnxStableDiffusionImg2Img OnnxStableDiffusionInpaint
        OnnxStableDiffusionUpscale StableDiffusionOnnx""",
    _OLD: """AltDiffusion AltDiffusionImg2Img BlipDiffusion BlipDiffusionControlNet UniDiffuser
        VQDiffusion VersatileDiffusion VersatileDiffusionDualGuided ShapE ShapEImg2Img
        VersatileDiffusionImageVariation VersatileDiffusionTextToImage WuerstchenDecoder""",
    _STAGES: "StableCascadeCombined UnCLIP UnCLIPImageVariation WuerstchenCombined RFD4Proteina",
    "Its images have a megapixel, which is not tiny.": "Kandinsky6SR",
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
