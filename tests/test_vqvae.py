"""The VQ-VAE for small pictures, the homework's network against its own outputs, saving and loading."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from smalti.errors import InputError
from smalti.image_tokenizers import FAMILIES, load_image_tokenizer, save_image_tokenizer
from smalti.image_tokenizers.quantizer import FSQConfig, LFQConfig, QuantizerConfig
from smalti.image_tokenizers.vqvae import (
    VQVAE,
    DeepulVQVAE,
    DeepulVQVAEConfig,
    VQVAEConfig,
    split_palette,
    split_two_colours,
)

SMALL = VQVAEConfig(
    image_size=15,
    patch_size=5,
    channels=2,
    levels=3,
    width=12,
    num_heads=2,
    quantizer=QuantizerConfig(codebook_size=17, code_dim=7),
)
CONFIGS = {
    "levels": SMALL,
    "continuous": replace(SMALL, levels=0),
    "two colours": replace(SMALL, two_colours=True),
    "palette": replace(SMALL, palette=3),
    "fsq": replace(SMALL, quantizer=FSQConfig(levels=(5, 3))),
    "lfq": replace(SMALL, quantizer=LFQConfig(num_bits=3)),
}


def make(config):
    torch.manual_seed(0)
    return VQVAE(config).eval()


def pictures(config, count=5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shape = (count, config.channels, config.image_size, config.image_size)
    return torch.randint(max(config.levels, 9), shape, generator=generator) / (max(config.levels, 9) - 1)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_shapes_ranges_and_batches(config):
    image_tokenizer = make(config)
    images = pictures(config)
    with torch.inference_mode():
        codes = image_tokenizer.encode_images(images)
        decoded = image_tokenizer.decode_codes(codes)
        one_by_one = torch.cat([image_tokenizer.encode_images(image[None]) for image in images])
    assert codes.shape == (5, *config.grid) == (5, 3, 3)
    assert codes.min() >= 0 and codes.max() < config.codebook_size
    assert decoded.shape == images.shape and decoded.dtype == torch.float32
    assert torch.equal(one_by_one, codes)
    if config.levels:
        assert torch.isin(decoded, torch.tensor([0, 0.5, 1])).all()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_parameter_gets_a_gradient(config):
    image_tokenizer = make(config).train()
    # Blocks start as the identity, behind which nothing has a gradient yet.
    for parameter in image_tokenizer.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    loss, quantized = image_tokenizer(pictures(config))
    (loss + quantized.loss).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in image_tokenizer.parameters())


def test_blocks_start_as_the_identity():
    block = make(SMALL).encoder[0]
    cells = torch.randn(2, 3, 5, 12)
    assert torch.equal(block(cells), cells)


def test_loss_in_nats_per_dim_of_an_undecided_network_is_the_log_of_the_levels():
    image_tokenizer = make(SMALL)
    torch.nn.init.zeros_(image_tokenizer.palette.weight)
    torch.nn.init.zeros_(image_tokenizer.palette.bias)
    loss, _ = image_tokenizer(pictures(SMALL))
    assert loss.item() == pytest.approx(np.log(3))


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=2, unique=True),
    st.integers(1, 48),
    st.integers(0, 10**6),
)
def test_splitting_two_colours_is_exact(colours, num_rare, seed):
    """Any two distinct colours, any share of the rarer one: the mask and both colours come back."""
    mask = torch.zeros(99)
    mask[torch.randperm(99, generator=torch.Generator().manual_seed(seed))[:num_rare]] = 1
    mask = mask.view(1, 1, 11, 9)
    frequent, rare = (torch.tensor(colour).float().view(1, 3, 1, 1) / 3 for colour in colours)
    found_mask, found = split_two_colours(torch.where(mask > 0, rare, frequent))
    assert torch.equal(found_mask, mask)
    torch.testing.assert_close(found[0], torch.stack([frequent.flatten(), rare.flatten()]))


def test_a_picture_of_one_colour_has_no_rarer_colour():
    mask, colours = split_two_colours(torch.full((1, 3, 7, 5), 2 / 3))
    assert not mask.any()
    torch.testing.assert_close(colours[0, 0], torch.full((3,), 2 / 3))


def test_two_coloured_pictures_have_shape_codes_that_do_not_change_with_the_colours():
    config = replace(SMALL, two_colours=True, channels=3, levels=4)
    image_tokenizer = make(config)
    mask = torch.zeros(1, 1, 15, 15)
    mask[..., 4:9, 6:8] = 1
    grids = []
    for frequent, rare in (((0, 0, 0), (3, 3, 3)), ((3, 1, 0), (3, 2, 0))):
        colours = [torch.tensor(colour).view(1, 3, 1, 1) / 3 for colour in (rare, frequent)]
        grids.append(image_tokenizer.encode_images(torch.where(mask > 0, *colours)))
    differing = (grids[0] != grids[1])[0]
    differing[0, 0] = differing[0, -1] = False
    assert not differing.any()


def test_overfits_eight_pictures_exactly():
    torch.manual_seed(2)
    config = VQVAEConfig(image_size=12, patch_size=4, width=32, num_heads=2, levels=4, quantizer=FSQConfig())
    image_tokenizer = VQVAE(config)
    # Tiles of 2 x 2 pixels: a patch has four colours, as many as the decoder mixes.
    images = (torch.randint(4, (8, 3, 6, 6)) / 3).repeat_interleave(2, 2).repeat_interleave(2, 3)
    optimizer = torch.optim.AdamW(image_tokenizer.parameters(), lr=1e-2)
    for _ in range(250):
        optimizer.zero_grad()
        loss, quantized = image_tokenizer(images)
        (loss + quantized.loss).backward()
        optimizer.step()
    image_tokenizer.eval()
    decoded = image_tokenizer.decode_codes(image_tokenizer.encode_images(images))
    assert (decoded == images).float().mean() > 0.999


# The homework's network
# ------------------------------------------------------------------------------------------

# Names of the original's state dict, less the number of the repeat in a residual stack.
ORIGINAL = {
    "pre_quantization_conv": "to_code",
    "vector_quantization.embedding.weight": "quantizer.codebook",
    "encoder.conv_stack": "encoder",
    "decoder.inverse_conv_stack": "decoder",
    "stack.0.res_block.1": "wide",
    "stack.0.res_block.3": "back",
}


def from_original(weights):
    renamed = {}
    for name, tensor in weights.items():
        if re.search(r"stack\.[1-9]\d*\.res_block", name):  # repeats of the one shared layer
            assert torch.equal(tensor, weights[re.sub(r"stack\.\d+\.res", "stack.0.res", name)])
            continue
        for theirs, ours in ORIGINAL.items():
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    return renamed


def test_deepul_network_equals_the_originals_outputs(shared_dir):
    folder = shared_dir / "golden" / "deepul_vqvae"
    args = json.loads((folder / "config.json").read_text())["args"]
    image_tokenizer = DeepulVQVAE(
        DeepulVQVAEConfig(
            width=args["h_dim"],
            residual_width=args["res_h_dim"],
            residual_layers=args["n_res_layers"],
            quantizer=QuantizerConfig(
                codebook_size=args["n_embeddings"], code_dim=args["embedding_dim"], update="gradient"
            ),
        )
    ).eval()
    image_tokenizer.load_state_dict(from_original(torch.load(folder / "weights.pt", weights_only=True)))
    io = {name: torch.from_numpy(array) for name, array in np.load(folder / "io.npz").items()}

    images = io["image"].permute(0, 3, 1, 2) / 3
    with torch.inference_mode():
        latents = image_tokenizer.latents(images)
        codes = image_tokenizer.encode_images(images)
        decoded = image_tokenizer.decode_codes(io["indices"]) * 3
        random_decoded = image_tokenizer.decode_codes(io["random_indices"]) * 3
    torch.testing.assert_close(latents.permute(0, 3, 1, 2), io["z_e"], atol=1e-4, rtol=0)
    assert torch.equal(codes, io["indices"])
    torch.testing.assert_close(decoded.permute(0, 2, 3, 1), io["decoded"], atol=1e-4, rtol=0)
    torch.testing.assert_close(random_decoded.permute(0, 2, 3, 1), io["random_decoded"], atol=1e-4, rtol=0)


def test_deepul_network_trains_and_takes_other_sizes():
    torch.manual_seed(3)
    config = DeepulVQVAEConfig(
        width=6, residual_width=5, quantizer=QuantizerConfig(codebook_size=11, code_dim=3, update="gradient")
    )
    image_tokenizer = DeepulVQVAE(config)
    assert config.grid == (7, 7)
    loss, quantized = image_tokenizer(torch.rand(2, 3, 20, 12))
    (loss + quantized.loss).backward()
    assert quantized.codes.shape == (2, 5, 3)
    assert all(parameter.grad is not None for parameter in image_tokenizer.parameters())
    assert image_tokenizer.decode_codes(quantized.codes).shape == (2, 3, 20, 12)


# Saving and loading
# ------------------------------------------------------------------------------------------------


DEEPUL = DeepulVQVAEConfig(width=6, residual_width=5, quantizer=QuantizerConfig(codebook_size=11, code_dim=3))


@pytest.mark.parametrize("config", [*CONFIGS.values(), DEEPUL], ids=[*CONFIGS, "deepul"])
def test_a_saved_image_tokenizer_comes_back_whole(config, tmp_path):
    module_class = next(module for config_class, module in FAMILIES.values() if type(config) is config_class)
    torch.manual_seed(4)
    saved = module_class(config)
    save_image_tokenizer(saved, tmp_path / "new" / "folder")
    loaded = load_image_tokenizer(tmp_path / "new" / "folder")
    assert loaded.config == config and not loaded.training
    assert all(torch.equal(tensor, saved.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_half_precision_halves_the_file_and_loads_in_float32(tmp_path):
    image_tokenizer = make(SMALL)
    save_image_tokenizer(image_tokenizer, tmp_path / "full")
    save_image_tokenizer(image_tokenizer, tmp_path / "half", dtype=torch.float16)
    full, half = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("full", "half"))
    assert half < 0.7 * full
    loaded = load_image_tokenizer(tmp_path / "half")
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == image_tokenizer.state_dict()[name].dtype
        torch.testing.assert_close(tensor, image_tokenizer.state_dict()[name], atol=1e-3, rtol=1e-3)


def edited(tmp_path, change):
    save_image_tokenizer(make(SMALL), tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    change(described)
    (tmp_path / "config.json").write_text(json.dumps(described))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("family"), "expected the entries family and config"),
        (lambda d: d.update(family="vae"), "unknown family 'vae'; known are vqvae, deepul_vqvae"),
        (lambda d: d["config"].update(widht=3), "unknown field widht; known are image_size"),
        (lambda d: d["config"]["quantizer"].update(beta=3), r"unknown field quantizer\.beta"),
        (lambda d: d["config"].update(width="wide"), "width: .*found 'wide'"),
        (lambda d: d["config"].update(patch_size=4), "image_size 15 is not divisible by patch_size 4; use 12"),
        (
            lambda d: d["config"].update(width=24),
            r"model\.safetensors does not fit the config beside it: .* in the file and .* by the config",
        ),
        (
            lambda d: d["config"].update(encoder_blocks=3),
            r"the first encoder\.2\.local\.weight, which is not there in the file",
        ),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_by_name(tmp_path, change, message):
    edited(tmp_path, change)
    with pytest.raises(InputError, match=f"(?s){message}"):
        load_image_tokenizer(tmp_path)


def test_missing_and_truncated_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*config\.json"):
        load_image_tokenizer(tmp_path)
    save_image_tokenizer(make(SMALL), tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors \(\d+ bytes\) is damaged or was changed"):
        load_image_tokenizer(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    del described["sha256"]  # as earlier versions wrote it
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(InputError, match=r"model\.safetensors is not a whole safetensors file"):
        load_image_tokenizer(tmp_path)
    safetensors.torch.save_file({"other": torch.zeros(1)}, weights)
    with pytest.raises(InputError, match=r"model\.safetensors does not fit the config beside it: \d+ tensors differ"):
        load_image_tokenizer(tmp_path)


def test_saving_what_is_not_an_image_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="Linear is not an image tokenizer; known are vqvae"):
        save_image_tokenizer(torch.nn.Linear(2, 3), tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 30}, "image_size 30 is not divisible by patch_size 4; use 28"),
        ({"num_heads": 3}, "width 128 is not divisible by num_heads 3"),
        ({"levels": 1}, "levels is 1; use 0 for continuous values or at least 2"),
        ({"encoder_blocks": -1}, "there cannot be -1 blocks"),
        ({"two_colours": True, "patch_size": 28}, "two_colours needs at least two columns of codes"),
        ({"channels": 0}, "channels is 0; it must be at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        VQVAEConfig(**settings)


def test_pictures_of_the_wrong_size_are_refused():
    with pytest.raises(ValueError, match=r"images are \(1, 2, 15, 14\); expected \(B, 2, 15, 15\)"):
        make(SMALL).encode_images(torch.zeros(1, 2, 15, 14))
    with pytest.raises(
        ValueError, match=r"images are \(1, 3, 20, 14\); expected \(B, 3, H, W\), H and W multiples of 4"
    ):
        DeepulVQVAE(DeepulVQVAEConfig(width=6)).encode_images(torch.zeros(1, 3, 20, 14))


def test_a_palette_is_in_the_order_of_first_appearance_and_has_the_most_frequent_colours():
    # 2 levels, 2 channels: colours 00, 10, 01, 11. The rarest of the four, 11, comes second and gets no place of three.
    rows = [["00", "11", "01"], ["01", "10", "10"], ["00", "00", "01"]]
    image = torch.tensor([[[int(pixel[channel]) for pixel in row] for row in rows] for channel in (0, 1)]).float()
    one_colour = torch.ones(2, 3, 3)
    shape, colours = split_palette(torch.stack([image, one_colour]), 3, 2)
    assert colours[0].tolist() == [[0, 0], [0, 1], [1, 0]]
    assert shape[0].argmax(0).tolist() == [[0, 1, 1], [1, 2, 2], [0, 0, 1]]  # 11 is as near to 01 as to 10: the first
    assert colours[1].tolist() == [[1, 1]] * 3 and shape[1].argmax(0).eq(0).all()
    assert shape.sum(1).eq(1).all()


@given(st.integers(0, 2**32 - 1), st.integers(2, 5))
def test_a_picture_of_no_more_colours_than_its_palette_is_told_exactly(seed: int, num_colours: int):
    generator = torch.Generator().manual_seed(seed)
    colours = torch.randint(4, (num_colours, 3), generator=generator) / 3
    image = colours[torch.randint(num_colours, (2, 7, 5), generator=generator)].permute(0, 3, 1, 2)
    shape, found = split_palette(image, num_colours, 4)
    assert torch.allclose(torch.einsum("bmhw,bmc->bchw", shape, found), image)


def test_shapes_in_other_colours_have_the_same_codes_but_for_the_palettes_own():
    config = replace(SMALL, palette=3, encoder_blocks=0)
    image_tokenizer = make(config)
    indices = torch.randint(3, (1, 15, 15), generator=torch.Generator().manual_seed(0))
    indices[0, 0, :3] = torch.arange(3)
    colours = torch.tensor([[[0, 0], [1, 0.5], [0, 1]], [[1, 1], [0, 0.5], [0.5, 0]]])
    one, other = (image_tokenizer.encode_images(table[indices].permute(0, 3, 1, 2)) for table in colours)
    assert torch.equal(one[:, 1:], other[:, 1:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"palette": 3, "two_colours": True}, "two ways to code colours apart"),
        ({"palette": 1}, "palette is 1; expected 0, or 2 to 3, the columns of codes"),
        ({"palette": 4}, "palette is 4; expected 0, or 2 to 3"),
        ({"palette": 3, "levels": 0}, "palette needs flat colours: levels 0"),
        ({"palette": 3, "levels": 256}, "levels 256 of 2 channels are not 2 to 4,096 colours"),
    ],
)
def test_a_palette_that_cannot_be_is_refused(changes, message: str):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)
