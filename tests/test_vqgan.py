"""VQGAN: sizes, shapes and the properties every image tokenizer has. Parity with the originals is in
test_import_tokenizers.py."""

from dataclasses import replace

import pytest
import torch

from smalti.image_tokenizers.quantizer import QuantizerConfig
from smalti.image_tokenizers.vqgan import PRESETS, VQGAN, ResidualBlock, VQGANConfig, attend, group_norm

TINY = VQGANConfig(
    quantizer=QuantizerConfig(codebook_size=37, code_dim=5, update="gradient", l2_normalised=True),
    image_size=(12, 20),
    channels=32,
    encoder_multipliers=(1, 2, 1),
    decoder_multipliers=(2, 1, 1),
    encoder_attention_levels=(1,),
    decoder_attention_levels=(0, 2),
    num_res_blocks=1,
    latent_channels=7,
)
TINY_MASKGIT = replace(
    TINY,
    quantizer=QuantizerConfig(codebook_size=37, code_dim=7, update="gradient"),
    encoder_attention_levels=(),
    decoder_attention_levels=(),
    form="maskgit",
)
TINY_FOLDED = replace(
    TINY,
    fold=2,
    local=True,
    encoder_multipliers=(1, 2),
    decoder_multipliers=(2, 1),
    encoder_attention_levels=(),
    decoder_attention_levels=(0,),
)


def build(config: VQGANConfig) -> VQGAN:
    torch.manual_seed(0)
    return VQGAN(config).eval()


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("name", "encoder", "decoder", "total"),
    [("vq-16", 29_298_176, 42_449_795, 71_883_403), ("vq-8", 28_559_232, 41_415_171, 70_109_835)],
)
def test_presets_have_the_published_parameter_counts(name, encoder, decoder, total):
    with torch.device("meta"):
        vqgan = VQGAN(PRESETS[name])
    assert (count(vqgan.encoder), count(vqgan.decoder), count(vqgan)) == (encoder, decoder, total)


def test_grids_of_the_presets():
    assert PRESETS["vq-16"].grid == (16, 16)
    assert PRESETS["vq-8"].grid == (32, 32)
    assert PRESETS["maskgit"].codebook_size == 1024


@pytest.mark.parametrize("config", [TINY, TINY_MASKGIT, TINY_FOLDED])
def test_any_size_that_halves_evenly(config):
    vqgan = build(config)
    assert vqgan.config.grid == (3, 5)
    with torch.inference_mode():
        codes = vqgan.encode_images(torch.rand(2, 3, 28, 12))
        assert codes.shape == (2, 7, 3)
        assert codes.dtype == torch.int64
        assert vqgan.decode_codes(codes).shape == (2, 3, 28, 12)


def test_other_sizes_are_refused_with_the_nearest_that_fit():
    with pytest.raises(ValueError, match=r"picture 13 x 22 does not divide into patches of 4 x 4.*12 x 24"):
        build(TINY).encode_images(torch.rand(1, 3, 13, 22))


@pytest.mark.parametrize("config", [TINY, TINY_MASKGIT, TINY_FOLDED])
def test_batch_and_single_pictures_give_the_same_codes(config):
    vqgan = build(config)
    images = torch.rand(5, 3, 12, 20)
    with torch.inference_mode():
        together = vqgan.encode_images(images)
        one_by_one = torch.cat([vqgan.encode_images(image[None]) for image in images])
    assert torch.equal(together, one_by_one)


@pytest.mark.parametrize("config", [TINY, TINY_MASKGIT, TINY_FOLDED])
def test_forward_is_encode_then_decode_and_trains_every_parameter(config):
    vqgan = build(config)
    images = torch.rand(2, 3, 12, 20)
    reconstructed, quantized = vqgan(images)
    codes = vqgan.encode_images(images)
    assert torch.equal(quantized.codes, codes)
    torch.testing.assert_close(reconstructed, vqgan.decode_codes(codes))
    ((reconstructed - images).square().mean() + quantized.loss).backward()
    without = [name for name, p in vqgan.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []


def test_pictures_keep_the_scale_0_to_1():
    # A decoder that gives 0 everywhere is mid-grey for a network in [-1, 1], black for one in [0, 1].
    for config, level in ((TINY, 0.5), (TINY_MASKGIT, 0.0)):
        vqgan = build(config)
        torch.nn.init.zeros_(vqgan.decoder.conv_out.weight)
        torch.nn.init.zeros_(vqgan.decoder.conv_out.bias)
        assert torch.equal(vqgan.decode_codes(torch.zeros(1, 2, 3, dtype=torch.long)), torch.full((1, 3, 8, 12), level))


def test_decodes_in_bf16():
    vqgan = build(TINY)
    codes = torch.randint(37, (2, 3, 5))
    with torch.inference_mode():
        exact = vqgan.decode_codes(codes)
        rough = vqgan.to(torch.bfloat16).decode_codes(codes)
        assert vqgan.encode_images(torch.rand(1, 3, 12, 20)).shape == (1, 3, 5)
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.05


def test_maskgit_shortcut_reads_the_branch_and_forgets_the_input():
    config = replace(TINY_MASKGIT, channels=32)
    x = torch.randn(1, 32, 4, 4)
    for form, expected in (("maskgit", 0.0), ("llamagen", None)):
        block = ResidualBlock(32, 64, config if form == "maskgit" else TINY)
        for parameter in (block.conv2.weight, block.conv2.bias):
            if parameter is not None:
                torch.nn.init.zeros_(parameter)
        if expected is None:
            assert torch.equal(block(x), block.shortcut(x))
        else:
            assert torch.equal(block(x), torch.zeros(1, 64, 4, 4))


def test_resampling_without_convolution_has_no_such_weights():
    vqgan = build(replace(TINY, resample_with_conv=False))
    assert not [name for name in vqgan.state_dict() if "resample" in name]
    assert vqgan.decode_codes(vqgan.encode_images(torch.rand(1, 3, 8, 8))).shape == (1, 3, 8, 8)


def test_folded_pixels_are_only_laid_out_otherwise():
    folded, plain = build(TINY_FOLDED), build(replace(TINY_FOLDED, fold=1, image_channels=12))
    plain.load_state_dict(folded.state_dict())
    images = torch.rand(2, 3, 12, 20)
    blocks = torch.nn.functional.pixel_unshuffle(images, 2)
    with torch.inference_mode():
        codes = plain.encode_images(blocks)
        assert torch.equal(folded.encode_images(images), codes)
        assert torch.equal(folded.decode_codes(codes), torch.nn.functional.pixel_shuffle(plain.decode_codes(codes), 2))


def test_local_codes_are_made_from_their_own_patch():
    for config, others in ((TINY_FOLDED, False), (replace(TINY_FOLDED, local=False), True)):
        vqgan = build(config)
        images = torch.rand(1, 3, 12, 20, requires_grad=True)
        vqgan.encode_latents(images)[0, 1, 2].sum().backward()
        assert images.grad is not None
        patch = torch.zeros(12, 20, dtype=torch.bool)
        patch[4:8, 8:12] = True
        seen = images.grad[0].any(0)
        assert seen[patch].all()
        assert bool(seen[~patch].any()) == others


def test_training_in_bf16_normalises_and_attends_in_float32():
    x = torch.randn(2, 64, 6, 5, dtype=torch.bfloat16, requires_grad=True)
    norm = group_norm(64)
    normed = norm(x)
    expected = torch.nn.functional.group_norm(x.detach().float(), 32, norm.weight, norm.bias, 1e-6)
    assert torch.equal(normed, expected.to(torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):  # it would turn attention back to bf16
        q, k, v = (torch.randn(2, 3, 7, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        mixed = attend(q, k, v)
    weights = (q.detach().double() @ k.detach().double().mT / 8**0.5).softmax(-1)
    assert torch.equal(mixed, (weights @ v.detach().double()).to(torch.bfloat16))


def test_codes_outside_the_codebook_are_refused():
    with pytest.raises(ValueError, match=r"code 37 is outside the codebook: codes lie in 0..36"):
        build(TINY).decode_codes(torch.full((1, 2, 2), 37))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 33}, "multiple of the 32 groups"),
        ({"channels": 16, "encoder_multipliers": (2, 2, 2)}, "width of 16; every width must be a multiple"),
        ({"encoder_attention_levels": (3,)}, r"encoder_attention_levels \[3\] must lie in 0..2"),
        ({"image_size": (12, 21)}, "image_size 12 x 21 does not divide"),
        ({"dropout": 1.0}, r"dropout is 1.0; it must lie in \[0, 1\)"),
        ({"num_res_blocks": 0}, "num_res_blocks is 0"),
        ({"form": "taming"}, 'form is \'taming\'; use "llamagen" or "maskgit"'),
        ({"form": "maskgit"}, "has no attention"),
        ({"fold": 0}, "fold is 0"),
        ({"local": True}, "attention sees all patches"),
    ],
)
def test_config_errors_name_the_field(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


def test_maskgit_quantizes_latents_as_they_are():
    with pytest.raises(ValueError, match="code_dim 7 must equal latent_channels 9"):
        replace(TINY_MASKGIT, latent_channels=9)
