"""TiTok: both targets, the mixed layout, the proxy. Parity with the original is in test_import_tokenizers.py."""

from dataclasses import replace

import pytest
import torch

from smalti.image_tokenizers.quantizer import QuantizerConfig
from smalti.image_tokenizers.titok import PRESETS, TiTok, TiTokConfig, ViTConfig
from smalti.image_tokenizers.vqgan import VQGAN, VQGANConfig

PROXY = VQGANConfig(
    quantizer=QuantizerConfig(codebook_size=13, code_dim=7, update="gradient"),
    image_size=(12, 20),
    channels=32,
    encoder_multipliers=(1, 1, 2),
    decoder_multipliers=(1, 1, 2),
    encoder_attention_levels=(),
    decoder_attention_levels=(),
    num_res_blocks=1,
    latent_channels=7,
    form="maskgit",
)
TWO_STAGE = TiTokConfig(
    encoder=ViTConfig(width=22, num_layers=2, num_heads=2, patch_size=2),
    decoder=ViTConfig(width=33, num_layers=1, num_heads=3, patch_size=4, mlp_ratio=2.5),
    num_latents=11,
    quantizer=QuantizerConfig(codebook_size=37, code_dim=5, update="gradient", l2_normalised=True),
    image_size=(12, 20),
    proxy=PROXY,
)
ONE_STAGE = replace(TWO_STAGE, target="pixels", proxy=None)
# 6 x 10 patches to read and 3 x 5 to write: runs of 12 and of 3.
REGIONAL = replace(ONE_STAGE, num_latents=5, regional=True)


def build(config: TiTokConfig) -> TiTok:
    torch.manual_seed(0)
    titok = TiTok(config).eval()
    for parameter in titok.parameters():  # beyond the small start, so that outputs depend on every weight
        torch.nn.init.normal_(parameter, std=0.2)
    return titok


def test_grids_and_released_sizes():
    assert PRESETS["l-32"].grid == (1, 32)
    assert PRESETS["s-128"].codebook_size == 4096
    assert PRESETS["bl-64"].codebook_size == 8192
    # The README of the release prints 641M, 205M and 84M.
    for name, millions in (("l-32", 641), ("b-64", 205), ("s-128", 84)):
        with torch.device("meta"):
            titok = TiTok(PRESETS[name])
        assert round(sum(p.numel() for p in titok.parameters()) / 1e6) == millions


@pytest.mark.parametrize("config", [TWO_STAGE, ONE_STAGE, REGIONAL])
def test_shapes_and_the_same_codes_in_a_batch(config):
    titok = build(config)
    images = torch.rand(5, 3, 12, 20)
    with torch.inference_mode():
        codes = titok.encode_images(images)
        assert codes.shape == (5, 1, config.num_latents)
        assert titok.decode_codes(codes).shape == images.shape
        assert torch.equal(codes, torch.cat([titok.encode_images(image[None]) for image in images]))


def test_other_sizes_are_refused():
    with pytest.raises(ValueError, match=r"picture 20 x 12 given.*12 x 20 alone"):
        build(ONE_STAGE).encode_images(torch.rand(1, 3, 20, 12))


@pytest.mark.parametrize("config", [TWO_STAGE, ONE_STAGE, REGIONAL])
def test_forward_is_encode_then_decode_and_trains_every_parameter(config):
    titok = build(config)
    images = torch.rand(2, 3, 12, 20)
    reconstructed, quantized = titok(images)
    torch.testing.assert_close(reconstructed, titok.decode_codes(titok.encode_images(images)))
    ((reconstructed - images).square().mean() + quantized.loss).backward()
    assert [name for name, p in titok.named_parameters() if p.grad is None] == []


def test_mixed_latents_read_channels_as_tokens():
    plain, mixed = build(ONE_STAGE), build(replace(ONE_STAGE, mixed_latents=True))
    images = torch.rand(2, 3, 12, 20)
    n, D = 11, 22
    encoded = []
    plain.encoder.norm_out.register_forward_hook(lambda _module, _inputs, output: encoded.append(output[:, -n:]))
    straight = plain.encode_latents(images)
    flat = encoded[0].reshape(2, -1)
    for token in range(n):
        picked = flat[:, [channel * n + token for channel in range(D)]]
        torch.testing.assert_close(mixed.encode_latents(images)[:, 0, token], plain.to_code(picked))
    torch.testing.assert_close(straight[:, 0], plain.to_code(encoded[0]))
    assert (straight - mixed.encode_latents(images)).abs().max() > 0.01


def test_pixel_head_puts_each_patch_in_its_place():
    titok = build(ONE_STAGE)
    head, p = titok.head, 4
    torch.nn.init.zeros_(head.smooth.weight)
    torch.nn.init.zeros_(head.smooth.bias)
    for colour in range(3):
        head.smooth.weight.data[colour, colour, 1, 1] = 1
    grid = torch.randn(1, 33, 3, 5)
    pixels = head.to_pixels(grid)
    picture = head(grid)
    for row, column, dy, dx, colour in ((0, 0, 0, 0, 0), (2, 4, 3, 1, 2), (1, 3, 2, 0, 1)):
        channel = (dy * p + dx) * 3 + colour
        torch.testing.assert_close(picture[0, colour, row * p + dy, column * p + dx], pixels[0, channel, row, column])


def test_a_regional_latent_starts_from_its_own_run_of_patches():
    titok = build(REGIONAL)
    for side in (titok.encoder, titok.decoder):  # without attention and feed-forward nothing is told to others
        for block in side.blocks:
            for layer in (block.attention.out, block.mlp_out):
                torch.nn.init.zeros_(layer.weight)
                torch.nn.init.zeros_(layer.bias)
    images = torch.rand(1, 3, 12, 20)
    other = images.clone()
    other[:, :, 5, 7] += 1.0  # patch (2, 3), the 23rd of 60: of the second run
    changed = (titok.encode_latents(other) - titok.encode_latents(images)).abs().amax((0, 1, 3))
    assert changed.nonzero().flatten().tolist() == [1]

    latents = torch.randn(1, 1, 5, 5)
    nudged = latents.clone()
    nudged[0, 0, 3] += 1.0  # its run is the patches 9 to 11 of 15: (1, 4), (2, 0), (2, 1)
    changed = (titok.decode_grid(nudged) - titok.decode_grid(latents)).abs().amax((0, 1))
    assert changed.nonzero().tolist() == [[1, 4], [2, 0], [2, 1]]


def test_regional_latents_reach_the_quantizer_normalised_over_the_batch():
    titok = build(REGIONAL).train()
    latents = titok.encode_latents(3 * torch.rand(7, 3, 12, 20))
    torch.testing.assert_close(latents.mean((0, 1, 2)), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(latents.square().mean((0, 1, 2)), torch.ones(5), atol=0.1, rtol=0)
    assert titok.latent_norm.running_mean.abs().max() > 0


def test_pictures_start_near_gray():
    torch.manual_seed(0)
    pictures = TiTok(ONE_STAGE).decode_codes(torch.randint(37, (3, 1, 11))).detach()
    assert abs(float(pictures.mean()) - 0.5) < 0.05
    assert float(pictures.std()) < 0.2


LOCAL = {"local": True, "fold": 2, "encoder_multipliers": (1, 2), "decoder_multipliers": (1, 2)}


@pytest.mark.parametrize(
    "changes",
    [{}, {"form": "llamagen", "latent_channels": 5}, {"form": "llamagen", **LOCAL}],
    ids=["maskgit", "llamagen", "local and folded"],
)
def test_certain_logits_decode_as_the_proxy_does(changes):
    config = replace(PROXY, **changes)
    titok, proxy = build(replace(TWO_STAGE, proxy=config)), VQGAN(config).eval()
    titok.load_proxy(proxy)
    codes = torch.randint(13, (2, 3, 5))
    logits = torch.nn.functional.one_hot(codes, 13).movedim(-1, 1) * 200.0
    torch.testing.assert_close(titok.proxy_pictures(logits), proxy.decode_codes(codes), atol=1e-5, rtol=1e-5)


def test_proxy_logits_have_one_entry_per_proxy_code_and_patch():
    titok = build(TWO_STAGE)
    latents = titok.quantizer.lookup(torch.randint(37, (2, 1, 11)))
    assert titok.proxy_logits(latents).shape == (2, 13, 3, 5)


def test_load_proxy_refuses_other_sizes():
    with pytest.raises(ValueError, match="this TiTok was built for"):
        build(TWO_STAGE).load_proxy(VQGAN(replace(PROXY, num_res_blocks=2)))


def test_decodes_in_bf16():
    titok = build(ONE_STAGE)
    codes = torch.randint(37, (2, 1, 11))
    with torch.inference_mode():
        exact = titok.decode_codes(codes)
        rough = titok.to(torch.bfloat16).decode_codes(codes)
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_latents": 0}, "num_latents is 0"),
        ({"target": "words"}, 'target is \'words\'; use "proxy_codes" or "pixels"'),
        ({"target": "pixels"}, 'a proxy is needed for "proxy_codes" and only there'),
        ({"regional": True}, "the 6 x 10 patches of the encoder cannot be shared out evenly among 11 latents"),
        ({"image_size": (12, 22)}, "image_size 12 x 22 does not divide into patches of 4 x 4"),
    ],
)
def test_config_errors_name_the_field(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(TWO_STAGE, **changes)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="width 22 is not divisible by num_heads 3"):
        ViTConfig(width=22, num_layers=1, num_heads=3)
