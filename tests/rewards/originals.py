"""The original networks of the converted rewards, written out on their own key layouts.

Random state dicts in the layout of the published checkpoints, and what those networks answer.
"""

import torch
import torch.nn.functional as F

WIDTH, INNER, SIZE, DEPTH = 32, 48, 24, 2


def random_state(shapes, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {k: 0.3 * torch.randn(s, generator=g) + (k.endswith("ln")) for k, s in shapes.items()}


def linear(name, out, into):
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def norm(name, width=WIDTH):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def apply(state, name, x):
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def normed(state, name, x, eps):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def attention(q, k, v, heads, bias=None):
    split = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    q, k, v = split
    weights = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if bias is not None:
        weights = weights + bias
    return (weights.softmax(-1) @ v).transpose(1, 2).flatten(2)


def head_shapes(size=WIDTH):
    sizes = (size, 1024, 128, 64, 16, 1)
    shapes = {}
    for i, key in enumerate((0, 2, 4, 6, 7)):
        shapes |= linear(f"layers.{key}", sizes[i + 1], sizes[i])
    return shapes


def head_forward(state, x, prefix=""):
    for key in (0, 2, 4, 6, 7):
        x = apply(state, f"{prefix}layers.{key}", x)
    return x[:, 0]


def open_clip_shapes(words, length, patch=8, cells=16):
    shapes = {
        "logit_scale": (),
        "positional_embedding": (length, WIDTH),
        "text_projection": (WIDTH, SIZE),
        "token_embedding.weight": (words, WIDTH),
        "visual.class_embedding": (WIDTH,),
        "visual.positional_embedding": (cells + 1, WIDTH),
        "visual.proj": (WIDTH, SIZE),
        "visual.conv1.weight": (WIDTH, 3, patch, patch),
        **norm("ln_final"),
        **norm("visual.ln_pre"),
        **norm("visual.ln_post"),
    }
    for tower in ("", "visual."):
        for i in range(DEPTH):
            block = f"{tower}transformer.resblocks.{i}"
            shapes |= norm(f"{block}.ln_1") | norm(f"{block}.ln_2")
            shapes |= {
                f"{block}.attn.in_proj_weight": (3 * WIDTH, WIDTH),
                f"{block}.attn.in_proj_bias": (3 * WIDTH,),
            }
            shapes |= linear(f"{block}.attn.out_proj", WIDTH, WIDTH)
            shapes |= linear(f"{block}.mlp.c_fc", INNER, WIDTH)
            shapes |= linear(f"{block}.mlp.c_proj", WIDTH, INNER)
    return shapes


def open_clip_blocks(state, prefix, x, heads, bias=None):
    for i in range(DEPTH):
        block = f"{prefix}transformer.resblocks.{i}"
        h = normed(state, f"{block}.ln_1", x, 1e-5)
        qkv = F.linear(
            h, state[f"{block}.attn.in_proj_weight"], state[f"{block}.attn.in_proj_bias"]
        )
        mixed = attention(*qkv.chunk(3, -1), heads, bias)
        x = x + apply(state, f"{block}.attn.out_proj", mixed)
        h = normed(state, f"{block}.ln_2", x, 1e-5)
        x = x + apply(state, f"{block}.mlp.c_proj", F.gelu(apply(state, f"{block}.mlp.c_fc", h)))
    return x


def open_clip_cosine(state, pixels, tokens, heads=1):
    """cos(image, text) [B]; the text is pooled at its largest token number."""
    x = F.conv2d(
        pixels, state["visual.conv1.weight"], stride=state["visual.conv1.weight"].shape[-1]
    )
    x = x.flatten(2).transpose(1, 2)
    first = state["visual.class_embedding"].expand(len(x), 1, -1)
    x = torch.cat([first, x], 1) + state["visual.positional_embedding"]
    x = open_clip_blocks(state, "visual.", normed(state, "visual.ln_pre", x, 1e-5), heads)
    image = normed(state, "visual.ln_post", x[:, 0], 1e-5) @ state["visual.proj"]
    length = tokens.shape[1]
    causal = torch.full((length, length), float("-inf")).triu(1)
    x = state["token_embedding.weight"][tokens] + state["positional_embedding"]
    x = normed(state, "ln_final", open_clip_blocks(state, "", x, heads, causal), 1e-5)
    text = x[torch.arange(len(x)), tokens.argmax(1)] @ state["text_projection"]
    return F.cosine_similarity(image, text)


def image_reward_shapes(words, patch=16, cells=4, vision=64, length=40):
    shapes = {
        "blip.visual_encoder.cls_token": (1, 1, vision),
        "blip.visual_encoder.pos_embed": (1, cells + 1, vision),
        "blip.visual_encoder.patch_embed.proj.weight": (vision, 3, patch, patch),
        "blip.visual_encoder.patch_embed.proj.bias": (vision,),
        **norm("blip.visual_encoder.norm", vision),
        "blip.text_encoder.embeddings.word_embeddings.weight": (words, WIDTH),
        "blip.text_encoder.embeddings.position_embeddings.weight": (length, WIDTH),
        **norm("blip.text_encoder.embeddings.LayerNorm"),
        **{f"mlp.{k}": v for k, v in head_shapes().items()},
    }
    for i in range(DEPTH):
        block = f"blip.visual_encoder.blocks.{i}"
        shapes |= norm(f"{block}.norm1", vision) | norm(f"{block}.norm2", vision)
        shapes |= linear(f"{block}.attn.qkv", 3 * vision, vision)
        shapes |= linear(f"{block}.attn.proj", vision, vision)
        shapes |= linear(f"{block}.mlp.fc1", INNER, vision) | linear(
            f"{block}.mlp.fc2", vision, INNER
        )
        layer = f"blip.text_encoder.encoder.layer.{i}"
        for part, source in (("attention", WIDTH), ("crossattention", vision)):
            shapes |= linear(f"{layer}.{part}.self.query", WIDTH, WIDTH)
            shapes |= linear(f"{layer}.{part}.self.key", WIDTH, source)
            shapes |= linear(f"{layer}.{part}.self.value", WIDTH, source)
            shapes |= linear(f"{layer}.{part}.output.dense", WIDTH, WIDTH)
            shapes |= norm(f"{layer}.{part}.output.LayerNorm")
        shapes |= linear(f"{layer}.intermediate.dense", INNER, WIDTH)
        shapes |= linear(f"{layer}.output.dense", WIDTH, INNER) | norm(f"{layer}.output.LayerNorm")
    return shapes


def image_reward_forward(state, pixels, tokens, mask, heads=1):
    """The head's raw answer [B]."""
    v = {k.removeprefix("blip.visual_encoder."): t for k, t in state.items()}
    x = F.conv2d(
        pixels,
        v["patch_embed.proj.weight"],
        v["patch_embed.proj.bias"],
        stride=v["patch_embed.proj.weight"].shape[-1],
    )
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([v["cls_token"].expand(len(x), -1, -1), x], 1) + v["pos_embed"]
    for i in range(DEPTH):
        h = normed(v, f"blocks.{i}.norm1", x, 1e-6)
        mixed = attention(*apply(v, f"blocks.{i}.attn.qkv", h).chunk(3, -1), heads)
        x = x + apply(v, f"blocks.{i}.attn.proj", mixed)
        h = normed(v, f"blocks.{i}.norm2", x, 1e-6)
        x = x + apply(v, f"blocks.{i}.mlp.fc2", F.gelu(apply(v, f"blocks.{i}.mlp.fc1", h)))
    seen = normed(v, "norm", x, 1e-6)
    t = {k.removeprefix("blip.text_encoder."): s for k, s in state.items()}
    x = t["embeddings.word_embeddings.weight"][tokens]
    x = x + t["embeddings.position_embeddings.weight"][: tokens.shape[1]]
    x = normed(t, "embeddings.LayerNorm", x, 1e-12)
    bias = torch.where(mask.bool(), 0.0, float("-inf"))[:, None, None]
    for i in range(DEPTH):
        layer = f"encoder.layer.{i}"
        for part, source, hidden in (("attention", None, bias), ("crossattention", seen, None)):
            source = x if source is None else source
            q = apply(t, f"{layer}.{part}.self.query", x)
            k, w = (apply(t, f"{layer}.{part}.self.{n}", source) for n in ("key", "value"))
            mixed = apply(t, f"{layer}.{part}.output.dense", attention(q, k, w, heads, hidden))
            x = normed(t, f"{layer}.{part}.output.LayerNorm", x + mixed, 1e-12)
        h = F.gelu(apply(t, f"{layer}.intermediate.dense", x))
        h = apply(t, f"{layer}.output.dense", h)
        x = normed(t, f"{layer}.output.LayerNorm", x + h, 1e-12)
    return head_forward(state, x[:, 0], "mlp.")
