"""ViT-VQGAN: positions, grids and the swapped decoder. Parity with the original is in test_import_tokenizers.py."""

import math
from dataclasses import replace

import pytest
import torch

from smalti.image_tokenizers.quantizer import QuantizerConfig
from smalti.image_tokenizers.vit_vqgan import PRESETS, ViTConfig, ViTVQGAN, ViTVQGANConfig, position_table

SIDE = ViTConfig(width=28, num_layers=2, num_heads=3, head_dim=5, mlp_width=11)
TINY = ViTVQGANConfig(
    encoder=SIDE,
    decoder=replace(SIDE, width=20, num_layers=1),
    quantizer=QuantizerConfig(codebook_size=37, code_dim=5, update="gradient", l2_normalised=True),
    image_size=(9, 15),
    patch_size=3,
)


def build(config: ViTVQGANConfig) -> ViTVQGAN:
    torch.manual_seed(0)
    return ViTVQGAN(config).eval()


@pytest.mark.parametrize(("name", "blocks", "width"), [("small", 8, 512), ("base", 12, 768), ("large", 32, 1280)])
def test_presets_follow_table_2(name, blocks, width):
    config = PRESETS[name]
    assert (config.encoder.num_layers, config.encoder.width, config.encoder.mlp_width) == (blocks, width, 4 * width)
    assert config.encoder.num_heads * config.encoder.head_dim == width
    assert (config.grid, config.codebook_size, config.quantizer.code_dim) == ((32, 32), 8192, 32)


def test_parameter_count_of_the_small_preset_by_hand():
    d, f, layers = 512, 2048, 8
    block = 2 * 2 * d + d * 3 * d + (d * d + d) + (d * f + f) + (f * d + d)
    side = layers * block + 2 * d
    around = (8 * 8 * 3 * d + d) + (d * 32 + 32) + 8192 * 32 + (32 * d + d) + (d * 8 * 8 * 3 + 3)
    with torch.device("meta"):
        small = ViTVQGAN(PRESETS["small"])
    assert sum(p.numel() for p in small.parameters()) == 2 * side + around


def test_position_table_by_hand():
    table = position_table(2, 3, 8)  # quarters of 2: frequencies 1 and 10000^(-1/2) = 0.01
    row, column = 1, 2
    expected = [
        math.sin(column), math.sin(column / 100), math.cos(column), math.cos(column / 100),
        math.sin(row), math.sin(row / 100), math.cos(row), math.cos(row / 100),
    ]  # fmt: skip
    torch.testing.assert_close(table[row * 3 + column], torch.tensor(expected))


def test_other_grids_get_their_own_positions():
    vit = build(TINY)
    images = torch.rand(2, 3, 12, 6)
    with torch.inference_mode():
        codes = vit.encode_images(images)
        assert codes.shape == (2, 4, 2)
        assert vit.decode_codes(codes).shape == images.shape
        other = ViTVQGAN(replace(TINY, image_size=(12, 6)))
        state = {name: tensor for name, tensor in vit.state_dict().items() if not name.endswith("positions")}
        assert other.load_state_dict(state, strict=False).missing_keys == ["encoder.positions", "decoder.positions"]
        torch.testing.assert_close(other.encode_latents(images), vit.encode_latents(images))


def test_a_table_of_its_own_serves_its_own_grid_only():
    vit = build(TINY)
    vit.encoder.positions.normal_()
    vit.encode_images(torch.rand(1, 3, 9, 15))
    with pytest.raises(ValueError, match=r"table of their own for a grid of 3 x 5 patches.*4 x 2"):
        vit.encode_images(torch.rand(1, 3, 12, 6))


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="picture 10 x 15 does not divide into patches of 3 x 3"):
        build(TINY).encode_images(torch.rand(1, 3, 10, 15))


def test_batch_and_single_pictures_give_the_same_codes():
    vit = build(TINY)
    images = torch.rand(5, 3, 9, 15)
    with torch.inference_mode():
        together = vit.encode_images(images)
        assert torch.equal(together, torch.cat([vit.encode_images(image[None]) for image in images]))


def test_forward_is_encode_then_decode_and_trains_every_parameter():
    vit = build(TINY)
    images = torch.rand(2, 3, 9, 15)
    reconstructed, quantized = vit(images)
    torch.testing.assert_close(reconstructed, vit.decode_codes(vit.encode_images(images)))
    ((reconstructed - images).square().mean() + quantized.loss).backward()
    assert [name for name, p in vit.named_parameters() if p.grad is None] == []


def test_pictures_start_near_gray():
    torch.manual_seed(0)
    vit = ViTVQGAN(TINY)
    pictures = vit.decode_codes(torch.randint(TINY.codebook_size, (3, 3, 5))).detach()
    assert abs(float(pictures.mean()) - 0.5) < 0.05
    assert float(pictures.std()) < 0.2


def test_a_patch_is_written_where_it_was_read():
    # The last layer alone: one-hot features at one cell must light that cell's pixels and no others.
    vit = build(TINY)
    torch.nn.init.ones_(vit.patches_out.weight)
    grid = torch.zeros(1, 3, 5, 20)
    grid[0, 1, 4] = 1
    picture = vit.patches_out(grid.movedim(-1, 1)) - vit.patches_out.bias[:, None, None]
    assert picture[0, 0].nonzero().tolist() == [[r, c] for r in (3, 4, 5) for c in (12, 13, 14)]


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_a_larger_decoder_leaves_the_codes_alone(update):
    small = build(replace(TINY, quantizer=replace(TINY.quantizer, update=update)))
    large = small.with_decoder(replace(SIDE, width=44, num_layers=3))
    images = torch.rand(3, 3, 9, 15)
    codes = small.encode_images(images)
    assert torch.equal(large.encode_images(images), codes)
    large.train()
    optimizer = torch.optim.SGD([p for p in large.parameters() if p.requires_grad], lr=0.1)
    reconstructed, quantized = large(images)
    ((reconstructed - images).square().mean() + quantized.loss).backward()
    optimizer.step()
    assert torch.equal(large.encode_images(images), codes)
    trained = {name.split(".")[0] for name, p in large.named_parameters() if p.requires_grad}
    assert trained == {"from_code", "decoder", "patches_out"}


def test_decodes_in_bf16():
    vit = build(TINY)
    codes = torch.randint(37, (2, 3, 5))
    with torch.inference_mode():
        exact = vit.decode_codes(codes)
        rough = vit.to(torch.bfloat16).decode_codes(codes)
        assert vit.decode_codes(torch.randint(37, (1, 2, 2))).shape == (1, 3, 6, 6)
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.1


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (SIDE, {"width": 30}, "width is 30; it must be a multiple of 4"),
        (SIDE, {"num_heads": 0}, "num_heads is 0; it must be at least 1"),
        (TINY, {"image_size": (9, 16)}, "image_size 9 x 16 does not divide"),
        (TINY, {"patch_size": 0}, "patch_size is 0"),
    ],
)
def test_config_errors_name_the_field(config, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(config, **changes)
