"""The published networks again, written plainly from a state dict under their own keys: oracles for what was imported.

Each `run_*` takes pictures in the range of its original, channels first (of deepul: 0..3, channels last), and returns a
`Traced` of arrays under the names of the reference folders.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

State = dict[str, Tensor]


class Layers:
    """Layers read off a state dict."""

    def __init__(self, state: State, maskgit: bool = False):
        self.state, self.maskgit = state, maskgit

    def conv(self, key, x, **kwargs):
        weight = self.state[f"{key}.weight"]
        kwargs.setdefault("padding", weight.shape[-1] // 2)
        return F.conv2d(x, weight, self.state.get(f"{key}.bias"), **kwargs)

    def linear(self, key, x):
        return F.linear(x, self.state[f"{key}.weight"], self.state.get(f"{key}.bias"))

    def group_norm(self, key, x):
        return F.group_norm(x, 32, self.state[f"{key}.weight"], self.state[f"{key}.bias"], eps=1e-6)

    def layer_norm(self, key, x):
        return F.layer_norm(x, x.shape[-1:], self.state[f"{key}.weight"], self.state[f"{key}.bias"])

    def res(self, key, x):
        h = self.conv(f"{key}.conv1", F.silu(self.group_norm(f"{key}.norm1", x)))
        h = self.conv(f"{key}.conv2", F.silu(self.group_norm(f"{key}.norm2", h)))
        if f"{key}.nin_shortcut.weight" not in self.state:
            return x + h
        return h + self.conv(f"{key}.nin_shortcut", h if self.maskgit else x)

    def attn(self, key, x):
        B, C, H, W = x.shape
        normed = self.group_norm(f"{key}.norm", x)
        q, k, v = (self.conv(f"{key}.{name}", normed).view(B, C, H * W) for name in "qkv")
        weights = (torch.einsum("bci,bcj->bij", q, k) * C**-0.5).softmax(-1)
        return x + self.conv(f"{key}.proj_out", torch.einsum("bij,bcj->bci", weights, v).view(x.shape))

    def out(self, side, x):
        return self.conv(f"{side}.conv_out", F.silu(self.group_norm(f"{side}.norm_out", x)))

    def blocks(self, x, res_key, attn_key, count):
        for j in range(count):
            x = self.res(res_key.format(j), x)
            if attn_key:
                x = self.attn(attn_key.format(j), x)
        return x


def down(x):
    return F.pad(x, (0, 1, 0, 1))


def up(x):
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


Sides = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
"""From pictures to latents before quantization, and from quantized latents to pictures."""


def taming_sides(state: State, resolution: int, attn_resolutions: list[int], num_levels: int, num_blocks: int) -> Sides:
    net = Layers(state)

    def encode(image):
        x, side = net.conv("encoder.conv_in", image), resolution
        for i in range(num_levels):
            attn_key = f"encoder.down.{i}.attn.{{}}" if side in attn_resolutions else None
            x = net.blocks(x, f"encoder.down.{i}.block.{{}}", attn_key, num_blocks)
            if i < num_levels - 1:
                x, side = net.conv(f"encoder.down.{i}.downsample.conv", down(x), stride=2, padding=0), side // 2
        x = net.res("encoder.mid.block_2", net.attn("encoder.mid.attn_1", net.res("encoder.mid.block_1", x)))
        return net.conv("quant_conv", net.out("encoder", x))

    def decode(z):
        x = net.conv("decoder.conv_in", net.conv("post_quant_conv", z))
        x = net.res("decoder.mid.block_2", net.attn("decoder.mid.attn_1", net.res("decoder.mid.block_1", x)))
        side = resolution // 2 ** (num_levels - 1)
        for i in reversed(range(num_levels)):
            attn_key = f"decoder.up.{i}.attn.{{}}" if side in attn_resolutions else None
            x = net.blocks(x, f"decoder.up.{i}.block.{{}}", attn_key, num_blocks + 1)
            if i > 0:
                x, side = net.conv(f"decoder.up.{i}.upsample.conv", up(x)), side * 2
        return net.out("decoder", x)

    return encode, decode


def llamagen_sides(state: State, num_encoder_levels: int, num_decoder_levels: int, num_blocks: int) -> Sides:
    net = Layers(state)

    def encode(image):
        x, last = net.conv("encoder.conv_in", image), num_encoder_levels - 1
        for i in range(num_encoder_levels):
            key = f"encoder.conv_blocks.{i}"
            x = net.blocks(x, f"{key}.res.{{}}", f"{key}.attn.{{}}" if i == last else None, num_blocks)
            if i < last:
                x = net.conv(f"{key}.downsample.conv", down(x), stride=2, padding=0)
        x = net.res("encoder.mid.2", net.attn("encoder.mid.1", net.res("encoder.mid.0", x)))
        return net.conv("quant_conv", net.out("encoder", x))

    def decode(z):
        x = net.conv("decoder.conv_in", net.conv("post_quant_conv", z))
        x = net.res("decoder.mid.2", net.attn("decoder.mid.1", net.res("decoder.mid.0", x)))
        for i in range(num_decoder_levels):
            key = f"decoder.conv_blocks.{i}"
            x = net.blocks(x, f"{key}.res.{{}}", f"{key}.attn.{{}}" if i == 0 else None, num_blocks + 1)
            if i < num_decoder_levels - 1:
                x = net.conv(f"{key}.upsample.conv", up(x))
        return net.out("decoder", x)

    return encode, decode


def maskgit_sides(state: State, num_levels: int, num_blocks: int, decoder: str = "decoder") -> Sides:
    net = Layers(state, maskgit=True)

    def encode(image):
        x = net.conv("encoder.conv_in", image)
        for i in range(num_levels):
            x = net.blocks(x, f"encoder.down.{i}.block.{{}}", None, num_blocks)
            if i < num_levels - 1:
                x = F.avg_pool2d(x, 2)
        return net.out("encoder", net.blocks(x, "encoder.mid.{}", None, num_blocks))

    def decode(z):
        x = net.blocks(net.conv(f"{decoder}.conv_in", z), f"{decoder}.mid.{{}}", None, num_blocks)
        for i in reversed(range(num_levels)):
            x = net.blocks(x, f"{decoder}.up.{i}.block.{{}}", None, num_blocks)
            if i > 0:
                x = net.conv(f"{decoder}.up.{i}.upsample_conv", up(x))
        return net.out(decoder, x)

    return encode, decode


def open_magvit2_sides(state: State, num_levels: int, num_blocks: int) -> Sides:
    net = Layers(state)

    def encode(image):
        x = net.conv("encoder.conv_in", image)
        for i in range(num_levels):
            x = net.blocks(x, f"encoder.down.{i}.block.{{}}", None, num_blocks)
            if i < num_levels - 1:
                x = net.conv(f"encoder.down.{i}.downsample", x, stride=2)
        return net.out("encoder", net.blocks(x, "encoder.mid_block.{}", None, num_blocks))

    def decode(z):
        num_cells = z.shape[2] * z.shape[3]
        mean = z.sum((2, 3)) / num_cells
        variance = (z - mean[..., None, None]).square().sum((2, 3)) / (num_cells - 1)
        x = net.blocks(net.conv("decoder.conv_in", z), "decoder.mid_block.{}", None, num_blocks)
        for i in reversed(range(num_levels)):
            gamma = net.linear(f"decoder.adaptive.{i}.gamma", (variance + 1e-6).sqrt())
            beta = net.linear(f"decoder.adaptive.{i}.beta", mean)
            x = gamma[..., None, None] * F.group_norm(x, 32, eps=1e-6) + beta[..., None, None]
            x = net.blocks(x, f"decoder.up.{i}.block.{{}}", None, num_blocks)
            if i > 0:
                x = net.conv(f"decoder.up.{i}.upsample.conv1", x)
                B, C, H, W = x.shape
                x = x.view(B, 2, 2, C // 4, H, W).permute(0, 3, 4, 1, 5, 2).reshape(B, C // 4, 2 * H, 2 * W)
        return net.out("decoder", x)

    return encode, decode


def largest_products(vectors: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """The codes of vectors (..., E) whose entries have the largest dot product, and those entries. Raises
    AssertionError where a code hangs on a near tie."""
    products = torch.einsum("...e,ke->...k", vectors, codebook)
    best, second = products.topk(2).values.unbind(-1)
    assert (best - second).min() > 1e-5, "a near tie: take another seed"
    codes = products.argmax(-1)
    return codes, codebook[codes]


def signs(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """The codes of vectors (..., E), bit j set where number j is above 0, and the corners they stand for. Raises
    AssertionError where a code hangs on a near tie."""
    assert vectors.abs().min() > 1e-6, "a near tie: take another seed"
    codes = sum((vectors[..., j] > 0).long() * 2**j for j in range(vectors.shape[-1]))
    return torch.as_tensor(codes), torch.where(vectors > 0, 1.0, -1.0)


def corners(codes: Tensor, num_bits: int = 5) -> Tensor:
    """What codes stand for: 1 where a bit is set, else -1, the lowest bit first."""
    return torch.stack([(codes // 2**j % 2) * 2.0 - 1 for j in range(num_bits)], dim=-1)


def run_gigatok(state: State, num_heads: int, labels: Tensor, codes: Tensor) -> Tensor:
    """Logits (B, L, n) of each code (B, L), from the label and the codes before it."""

    def rms(key, x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * state[f"{key}.weight"]

    x = torch.cat(
        (state["cls_embedding.embedding_table.weight"][labels][:, None], state["tok_embeddings.weight"][codes[:, :-1]]),
        dim=1,
    )
    B, T, D = x.shape
    x = x + state["positional_embedding"][:T]
    future = torch.ones(T, T).triu(1).bool()
    for i in range(sum(key.endswith("wqkv.weight") for key in state)):
        key = f"layers.{i}"
        qkv = rms(f"{key}.attention_norm", x) @ state[f"{key}.attention.wqkv.weight"].T
        q, k, v = (part.view(B, T, num_heads, -1).transpose(1, 2) for part in qkv.chunk(3, -1))
        weights = (q @ k.mT / math.sqrt(D / num_heads)).masked_fill(future, -math.inf).softmax(-1)
        x = x + (weights @ v).transpose(1, 2).reshape(B, T, D) @ state[f"{key}.attention.wo.weight"].T
        h = rms(f"{key}.ffn_norm", x)
        gate, up = (h @ state[f"{key}.feed_forward.{name}.weight"].T for name in ("w1", "w3"))
        x = x + (F.silu(gate) * up) @ state[f"{key}.feed_forward.w2.weight"].T
    return rms("norm", x) @ state["output.weight"].T


def search(vectors: Tensor, codebook: Tensor, l2_normalised: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The vectors (..., E) as they are compared, the codes nearest to them, and those codes' entries. Raises
    AssertionError where a code hangs on a near tie: such a case tests nothing."""
    if l2_normalised:
        vectors, codebook = F.normalize(vectors, dim=-1), F.normalize(codebook, dim=-1)
    distances = (vectors[..., None, :] - codebook).square().sum(-1)
    best, second = distances.topk(2, largest=False).values.unbind(-1)
    assert (second - best).min() > 1e-5, "a near tie: take another seed"
    codes = distances.argmin(-1)
    return vectors, codes, codebook[codes]


def run_grid(
    sides: Sides, codebook: Tensor, l2_normalised: bool, image: Tensor, image_nonsquare: Tensor, random_indices: Tensor
) -> dict[str, Tensor]:
    """The arrays of a convolutional tokenizer whose codes are the nearest of a codebook."""
    entries = F.normalize(codebook, dim=-1) if l2_normalised else codebook

    def choose(z):
        return search(z, codebook, l2_normalised)[1:]

    return run_codes(sides, choose, lambda codes: entries[codes], image, image_nonsquare, random_indices)


def run_codes(
    sides: Sides,
    choose: Callable[[Tensor], tuple[Tensor, Tensor]],
    lookup: Callable[[Tensor], Tensor],
    image: Tensor,
    image_nonsquare: Tensor,
    random_indices: Tensor,
) -> dict[str, Tensor]:
    """The arrays of a convolutional tokenizer; codes are (B, h*w), latents (B, E, h, w). `choose` gives the codes of
    latents (..., E) and what is handed to the decoder, `lookup` the latter of codes."""
    encode, decode = sides
    arrays = {}
    for prefix, pictures in (("", image), ("nonsquare_", image_nonsquare)):
        z = encode(pictures)
        codes, entries = choose(z.movedim(1, -1))
        arrays[f"{prefix}z_e"] = z
        arrays[f"{prefix}indices"] = codes.flatten(1)
        arrays[f"{prefix}reconstruction"] = decode(entries.movedim(-1, 1))
        if not prefix:
            arrays["z_q"] = entries.movedim(-1, 1)
            arrays["decoded"] = arrays["reconstruction"]
    arrays["random_decoded"] = decode(lookup(random_indices).mT.reshape(arrays["z_q"].shape))
    return arrays


def quantizer_terms(z: Tensor, codebook: Tensor, l2_normalised: bool) -> Tensor:
    """The mean squared distance of latents (B, E, h, w) from their codes' entries: both quantizer losses but for their
    weights."""
    compared, _, entries = search(z.movedim(1, -1), codebook, l2_normalised)
    return (compared - entries).square().mean()


def clip_blocks(net: Layers, side: str, x: Tensor, num_layers: int, num_heads: int) -> Tensor:
    """The residual attention blocks of CLIP, which TiTok took over."""
    for i in range(num_layers):
        key = f"{side}.transformer.{i}"
        normed = net.layer_norm(f"{key}.ln_1", x).transpose(0, 1)  # (T, B, D)
        mixed, _ = F.multi_head_attention_forward(
            normed,
            normed,
            normed,
            x.shape[-1],
            num_heads,
            net.state[f"{key}.attn.in_proj_weight"],
            net.state[f"{key}.attn.in_proj_bias"],
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=0.0,
            out_proj_weight=net.state[f"{key}.attn.out_proj.weight"],
            out_proj_bias=net.state[f"{key}.attn.out_proj.bias"],
        )
        x = x + mixed.transpose(0, 1)
        x = x + net.linear(f"{key}.mlp.c_proj", F.gelu(net.linear(f"{key}.mlp.c_fc", net.layer_norm(f"{key}.ln_2", x))))
    return x


def run_titok(state: State, config: dict, image: Tensor, random_indices: Tensor) -> dict[str, Tensor]:
    """`config` is in the form of the reference folders. Latents are (B, E, 1, n), codes (B, 1, n)."""
    net, model = Layers(state), config["config"]["model"]["vq_model"]
    sizes = {side: config["model_sizes"][model[f"vit_{side}_model_size"]] for side in ("enc", "dec")}
    legacy, n, B = model.get("is_legacy", True), model["num_latent_tokens"], len(image)
    patch = model["vit_dec_patch_size"]
    rows, columns = image.shape[2] // patch, image.shape[3] // patch

    x = net.conv("encoder.patch_embed", image, stride=model["vit_enc_patch_size"], padding=0).flatten(2).transpose(1, 2)
    num_patches = x.shape[1]
    x = torch.cat([state["encoder.class_embedding"].expand(B, 1, -1), x], 1) + state["encoder.positional_embedding"]
    latents = (state["latent_tokens"] + state["encoder.latent_token_positional_embedding"]).expand(B, -1, -1)
    x = net.layer_norm("encoder.ln_pre", torch.cat([x, latents], 1))
    x = clip_blocks(net, "encoder", x, sizes["enc"]["num_layers"], sizes["enc"]["num_heads"])
    x = net.layer_norm("encoder.ln_post", x[:, 1 + num_patches :])
    x = x.reshape(B, -1, n, 1) if legacy else x.permute(0, 2, 1)[..., None]
    z = net.conv("encoder.conv_out", x).reshape(B, model["token_size"], 1, n)

    def decode(entries):  # (B, n, E)
        arrays = {}
        masks = torch.cat(
            [
                state["decoder.class_embedding"].expand(B, 1, -1),
                state["decoder.mask_token"].expand(B, rows * columns, -1),
            ],
            1,
        )
        tokens = net.linear("decoder.decoder_embed", entries) + state["decoder.latent_token_positional_embedding"]
        x = torch.cat([masks + state["decoder.positional_embedding"], tokens], 1)
        x = net.layer_norm("decoder.ln_pre", x)
        x = clip_blocks(net, "decoder", x, sizes["dec"]["num_layers"], sizes["dec"]["num_heads"])
        x = net.layer_norm("decoder.ln_post", x[:, 1 : 1 + rows * columns])
        x = net.conv("decoder.ffn.0", x.transpose(1, 2).reshape(B, -1, rows, columns))
        if not legacy:
            x = x.view(B, patch, patch, 3, rows, columns).permute(0, 3, 4, 1, 5, 2).reshape(image.shape)
            return {"decoded": net.conv("decoder.conv_out", x)}
        arrays["pixel_logits"] = logits = net.conv("decoder.ffn.2", torch.tanh(x))
        codebook = state["pixel_quantize.embedding.weight"]
        arrays["pixel_latents"] = torch.einsum("bkhw,kd->bdhw", logits.softmax(1), codebook)
        pixels = config["pixel_decoder"]
        _, to_pixels = maskgit_sides(state, len(pixels["channel_mult"]), pixels["num_res_blocks"], "pixel_decoder")
        return {**arrays, "decoded": to_pixels(arrays["pixel_latents"])}

    codebook = state["quantize.embedding.weight"]
    _, codes, entries = search(z[:, :, 0].movedim(1, -1), codebook, model["use_l2_norm"])
    found = decode(entries)
    given = (F.normalize(codebook, dim=-1) if model["use_l2_norm"] else codebook)[random_indices[:, 0]]
    return {
        "z_e": z,
        "z_q": entries.movedim(-1, 1)[:, :, None],
        "indices": codes[:, None],
        **found,
        **{f"random_{name}": array for name, array in decode(given).items()},
        "reconstruction": found["decoded"],
    }


def sine_positions(width: int, rows: int, columns: int) -> Tensor:
    """The table of MAE: the first half of the channels tells the column, the second the row."""

    def axis(places):  # (T,) -> (T, width / 2)
        quarter = width // 4
        angles = torch.outer(places, 1.0 / 10000 ** (torch.arange(quarter, dtype=torch.float64) / quarter))
        return torch.cat([angles.sin(), angles.cos()], 1)

    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.cat([axis(column.flatten().double()), axis(row.flatten().double())], 1).float()[None]


def run_vit_vqgan(state: State, config: dict, image: Tensor, random_indices: Tensor) -> dict[str, Tensor]:
    """`config` is the section `params`. Latents are (B, T, E), codes (B, T)."""
    net, codes_config = Layers(state), config["quantizer"]
    patch = config["patch_size"]
    B, _, H, W = image.shape
    l2_normalised, beta = codes_config.get("use_norm", True), codes_config.get("beta", 0.25)

    def transformer(side, x):
        size = config[side]
        for i in range(size["depth"]):
            key = f"{side}.transformer.layers.{i}"
            q, k, v = net.linear(f"{key}.0.fn.to_qkv", net.layer_norm(f"{key}.0.norm", x)).chunk(3, -1)
            q, k, v = (part.unflatten(-1, (size["heads"], -1)).transpose(1, 2) for part in (q, k, v))
            weights = (q @ k.transpose(-1, -2) / math.sqrt(size.get("dim_head", 64))).softmax(-1)
            mixed = (weights @ v).transpose(1, 2).flatten(2)
            has_out = f"{key}.0.fn.to_out.weight" in state
            x = x + (net.linear(f"{key}.0.fn.to_out", mixed) if has_out else mixed)
            h = torch.tanh(net.linear(f"{key}.1.fn.net.0", net.layer_norm(f"{key}.1.norm", x)))
            x = x + net.linear(f"{key}.1.fn.net.2", h)
        return net.layer_norm(f"{side}.transformer.norm", x)

    def decode(entries):  # (B, T, E)
        x = transformer("decoder", net.linear("post_quant", entries) + state["decoder.de_pos_embedding"])
        x = x.transpose(1, 2).reshape(B, -1, H // patch, W // patch)
        return F.conv_transpose2d(x, state["decoder.to_pixel.1.weight"], state["decoder.to_pixel.1.bias"], stride=patch)

    x = net.conv("encoder.to_patch_embedding.0", image, stride=patch, padding=0).flatten(2).transpose(1, 2)
    features = transformer("encoder", x + state["encoder.en_pos_embedding"])
    z = net.linear("pre_quant", features)
    codebook = state["quantizer.embedding.weight"]
    compared, codes, entries = search(z, codebook, l2_normalised)
    given = (F.normalize(codebook, dim=-1) if l2_normalised else codebook)[random_indices]
    return {
        "encoder_features": features,
        "z_e": z,
        "indices": codes,
        "z_q": entries,
        "codebook_loss": (1 + beta) * (compared - entries).square().mean(),
        "decoded": decode(entries),
        "random_decoded": decode(given),
        "reconstruction": decode(entries),
        "en_pos_embedding": state["encoder.en_pos_embedding"],
        "de_pos_embedding": state["decoder.de_pos_embedding"],
    }


def run_deepul(state: State, num_layers: int, image: Tensor, random_indices: Tensor) -> dict[str, Tensor]:
    """`image` is (B, 28, 28, 3) of values 0..3. Latents are (B, E, 7, 7), codes (B, 7, 7)."""
    net = Layers(state)

    def stack(key, x):
        for i in range(num_layers):
            positive = F.relu(x)
            h = net.conv(f"{key}.stack.{i}.res_block.1", positive)
            x = positive + net.conv(f"{key}.stack.{i}.res_block.3", F.relu(h), padding=0)
        return F.relu(x)

    def widen(key, x, **kwargs):
        return F.conv_transpose2d(x, state[f"{key}.weight"], state[f"{key}.bias"], padding=1, **kwargs)

    def decode(codes):
        key = "decoder.inverse_conv_stack"
        x = stack(f"{key}.1", widen(f"{key}.0", codebook[codes].movedim(-1, 1)))
        return widen(f"{key}.4", F.relu(widen(f"{key}.2", x, stride=2)), stride=2).movedim(1, -1) + 1.5

    key, codebook = "encoder.conv_stack", state["vector_quantization.embedding.weight"]
    x = F.relu(net.conv(f"{key}.0", image.movedim(-1, 1).float() - 1.5, stride=2, padding=1))
    x = F.relu(net.conv(f"{key}.2", x, stride=2, padding=1))
    x = stack(f"{key}.5", net.conv(f"{key}.4", x))
    z = net.conv("pre_quantization_conv", x)
    _, codes, _ = search(z.movedim(1, -1), codebook, False)
    return {"z_e": z, "indices": codes, "decoded": decode(codes), "random_decoded": decode(random_indices)}
