"""IBQ's and Open-MAGVIT2's image tokenizers: parity with the networks written plainly, their checkpoints, bad files."""

import json
from functools import partial

import numpy as np
import pytest
import torch
import yaml
from original_networks import corners, largest_products, open_magvit2_sides, run_codes, signs, taming_sides
from PIL import Image
from test_import_tokenizers import IBQ_CONFIG, MAGVIT2_CONFIG, random_module

from smalti.cli.app import run
from smalti.errors import InputError
from smalti.image_tokenizers import load_image_tokenizer
from smalti.image_tokenizers.open_magvit2 import OpenMAGVIT2, OpenMAGVIT2Config
from smalti.image_tokenizers.quantizer import IBQConfig, LFQConfig
from smalti.interop import ibq, open_magvit2, taming
from smalti.interop.commands import KINDS, verify
from smalti.interop.keys import export_foreign, import_foreign

CONFIGS = {"ibq": IBQ_CONFIG, "open-magvit2": MAGVIT2_CONFIG}
KIND = pytest.mark.parametrize("kind", CONFIGS)


def foreign_state(kind: str) -> dict[str, torch.Tensor]:
    return export_foreign(KINDS[kind], random_module(KINDS[kind], CONFIGS[kind]))


def original_arrays(kind: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The arrays of a reference folder, computed from the state dict under the original's keys."""
    generator = torch.Generator().manual_seed(1)
    image = 2 * torch.rand(2, 3, 24, 24, generator=generator) - 1
    nonsquare = 2 * torch.rand(1, 3, 12, 20, generator=generator) - 1
    random = torch.randint(31, (2, 36), generator=generator)
    if kind == "ibq":
        codebook = state["quantize.embedding.weight"]
        sides = taming_sides(state, 24, [6], 3, 3)
        choose, lookup = partial(largest_products, codebook=codebook), codebook.__getitem__
    else:
        sides, choose, lookup = open_magvit2_sides(state, 3, 2), signs, corners
    arrays = {"image": image, "image_nonsquare": nonsquare, "random_indices": random}
    return arrays | run_codes(sides, choose, lookup, image, nonsquare, random)


def write_folder(folder, kind: str, state: dict[str, torch.Tensor], arrays: dict[str, torch.Tensor]):
    folder.mkdir()
    torch.save({"state_dict": state}, folder / "weights.ckpt")
    (folder / "config.json").write_text(json.dumps(CONFIGS[kind]))
    np.savez(folder / "io.npz", **{name: array.numpy() for name, array in arrays.items()})
    return folder


@KIND
def test_every_array_is_that_of_the_network_written_plainly(tmp_path, kind):
    state = foreign_state(kind)
    arrays = original_arrays(kind, state)
    if kind == "ibq":
        z, e = arrays["z_e"], arrays["z_q"]
        arrays["quant_loss"] = (2 + 0.5) * (z - e).square().mean()  # beta 0.5
        distances = torch.cdist(z.movedim(1, -1).flatten(0, 2), state["quantize.embedding.weight"])
        assert (distances.argmin(-1) != arrays["indices"].flatten()).any(), "the nearest entry would do as well"
    assert len(arrays["indices"].unique()) > 4
    folder = write_folder(tmp_path / "reference", kind, state, arrays)
    errors = verify(kind, folder)
    assert {error.name for error in errors} == set(arrays) - {"image", "image_nonsquare", "random_indices"}
    assert [error for error in errors if not error.holds] == []
    command = ["import", kind, str(folder / "weights.ckpt"), "--verify", str(folder), "--quiet"]
    assert run([*command, "--config", str(folder / "config.json"), "-o", str(tmp_path / "good")]) == 0
    key = next(key for key in state if "norm_out" in key)
    state[key][0] += 0.5
    torch.save({"state_dict": state}, folder / "weights.ckpt")
    assert run([*command, "--config", str(folder / "config.json"), "-o", str(tmp_path / "bad")]) == 1
    assert not (tmp_path / "bad").exists()


@KIND
def test_checkpoints_of_lightning_give_their_averaged_weights(tmp_path, kind, capsys):
    """With discriminator, LPIPS and LitEma's copies of everything, as training leaves them; sizes from its YAML."""
    averaged = foreign_state(kind)
    last = {key: tensor + 1 for key, tensor in averaged.items()}
    loss = {
        "loss.discriminator.main.0.weight": torch.ones(3),
        "loss.perceptual_loss.lin0.model.1.weight": torch.ones(2),
    }
    kept = {key.replace(".", ""): tensor for key, tensor in (averaged | loss).items()}
    ema = {"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(-1)}
    ema |= {f"model_ema.{name}": tensor for name, tensor in kept.items()}
    torch.save({"state_dict": last | loss | ema, "epoch": 3, "optimizer_states": [{}]}, tmp_path / "last.ckpt")
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(CONFIGS[kind]))
    command = ["import", kind, str(tmp_path / "last.ckpt"), "-o", str(tmp_path / "out")]
    assert run([*command, "--config", str(tmp_path / "train.yaml")]) == 0
    printed = capsys.readouterr().out
    assert f"{len(averaged)} tensors read, 2 dropped, none missing or unexpected" in printed
    assert "loss.discriminator.main.0.weight dropped: part of the training loss" in printed
    assert (
        f"averaged (EMA) weights taken from `model_ema` for {len(averaged) + 2} of {len(averaged) + 2} tensors"
        in printed
    )
    loaded = load_image_tokenizer(tmp_path / "out")
    assert loaded.config.image_size == (24, 24)
    # exported, and imported again by the config beside the file
    assert run(["export", kind, str(tmp_path / "out"), str(tmp_path / "again.safetensors")]) == 0
    assert run(["import", kind, str(tmp_path / "again.safetensors"), "-o", str(tmp_path / "second"), "--quiet"]) == 0
    again = load_image_tokenizer(tmp_path / "second")
    assert again.config == loaded.config
    exported = export_foreign(KINDS[kind], again)
    assert set(exported) == set(averaged) and all(torch.equal(exported[key], averaged[key]) for key in averaged)


def test_a_bare_config_is_that_of_emu():
    """Emu3.5 builds its tokenizer of the fields alone."""
    assert ibq.read_config(IBQ_CONFIG["model"]["init_args"]) == ibq.read_config(IBQ_CONFIG)


def test_published_sizes():
    for layout, sizes in ((ibq.LAYOUT, [1024, 8192, 16384, 262144]), (open_magvit2.LAYOUT, [262144, 16384, 262144])):
        published = list(layout.published.values())
        assert [config.codebook_size for config in published] == sizes
        assert [config.grid for config in published] == [(16, 16)] * len(published)
    network = {"double_z": False, "z_channels": 256, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128}
    network |= {"ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 4, "attn_resolutions": [16], "dropout": 0.0}
    for config in ibq.LAYOUT.published.values():
        given = {"ddconfig": dict(network), "n_embed": config.codebook_size, "embed_dim": 256}
        assert ibq.read_config(given) == config
    network = {"double_z": False, "resolution": 128, "in_channels": 3, "out_ch": 3, "ch": 128, "num_res_blocks": 4}
    for config, bits in zip(open_magvit2.LAYOUT.published.values(), (18, 14, 18), strict=True):
        side, multipliers = config.image_size[0], list(config.multipliers)
        params = {"ddconfig": network | {"z_channels": bits, "ch_mult": multipliers}, "n_embed": 2**bits}
        data = {"init_args": {"validation": {"params": {"config": {"size": side}}}}}
        model = {"class_path": "src.Open_MAGVIT2.models.lfqgan_pretrain.VQModel"}
        given = {"model": {**model, "init_args": params | {"embed_dim": bits}}, "data": data}
        assert open_magvit2.read_config(given) == config


def test_a_tokenizer_is_not_written_in_the_layout_of_another_quantizer():
    module = random_module(ibq.LAYOUT, IBQ_CONFIG)
    with pytest.raises(ValueError, match="taming layout holds a learned codebook; this tokenizer's codes are 'ibq'"):
        export_foreign(taming.LAYOUT, module)
    config = {**IBQ_CONFIG["model"]["init_args"]["ddconfig"]}
    near = random_module(taming.LAYOUT, {"ddconfig": config, "n_embed": 31, "embed_dim": 5})
    with pytest.raises(ValueError, match="of which the largest dot product is chosen; this tokenizer's codes are 'vq'"):
        export_foreign(ibq.LAYOUT, near)


@KIND
def test_pictures_are_rebuilt_and_tokenized_by_the_commands(tmp_path, kind, capsys):
    torch.save({"state_dict": foreign_state(kind)}, tmp_path / "w.ckpt")
    (tmp_path / "w.config.json").write_text(json.dumps(CONFIGS[kind]))
    assert run(["import", kind, str(tmp_path / "w.ckpt"), "-o", str(tmp_path / "out"), "--quiet"]) == 0
    (tmp_path / "pictures").mkdir()
    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        pixels = generator.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{name}.png")
        (tmp_path / "pictures" / f"{name}.txt").write_text("a caption")
    report = tmp_path / "report"
    assert run(["evaluate", "tokenizer", str(tmp_path / "out"), str(tmp_path / "pictures"), "-o", str(report)]) == 0
    assert (report / "reconstruction.json").is_file()
    tokens = tmp_path / "tokens.parquet"
    command = ["tokenize", str(tmp_path / "pictures"), "-o", str(tokens), "--image-tokenizer", str(tmp_path / "out")]
    assert run(command) == 0 and tokens.is_file()
    capsys.readouterr()


class Malicious:
    def __reduce__(self):
        return print, ("it ran",)


@KIND
def test_files_that_do_not_fit_are_refused_and_nothing_is_written(tmp_path, kind, capsys):
    state, config = foreign_state(kind), json.loads(json.dumps(CONFIGS[kind]))
    (tmp_path / "config.json").write_text(json.dumps(config))
    config["model"]["init_args"]["ddconfig"]["ch"] = 64
    (tmp_path / "wide.json").write_text(json.dumps(config))
    config["model"]["init_args"]["ddconfig"]["ch"] = 33
    (tmp_path / "odd.json").write_text(json.dumps(config))
    key = "decoder.conv_in.bias"
    torch.save({"state_dict": state}, tmp_path / "good.ckpt")
    (tmp_path / "short.ckpt").write_bytes((tmp_path / "good.ckpt").read_bytes()[:-3000])
    torch.save({"state_dict": {**state, key: torch.full_like(state[key], torch.nan)}}, tmp_path / "nan.ckpt")
    torch.save({"state_dict": {k: t for k, t in state.items() if k != key}}, tmp_path / "missing.ckpt")
    torch.save({"state_dict": {**state, "decoder.more": torch.zeros(2)}}, tmp_path / "more.ckpt")
    torch.save({"state_dict": state, "callbacks": Malicious()}, tmp_path / "evil.ckpt")
    for file, given, message in (
        ("short.ckpt", "config.json", "cut short"),
        ("nan.ckpt", "config.json", "decoder.conv_in.bias holds"),
        ("missing.ckpt", "config.json", "missing: decoder.conv_in.bias"),
        ("more.ckpt", "config.json", "unexpected: decoder.more"),
        ("evil.ckpt", "config.json", "nothing in it was run"),
        ("good.ckpt", "wide.json", "the weights do not fit the network"),
        ("good.ckpt", "odd.json", "gives a width of 33"),
        ("good.ckpt", None, f"fit none of the published {kind} models"),
    ):
        command = ["import", kind, str(tmp_path / file), "-o", str(tmp_path / "out")]
        if given is None:
            (tmp_path / "config.json").unlink()
        assert run(command + ([] if given is None else ["--config", str(tmp_path / given)])) == 2, message
        printed = capsys.readouterr()
        assert message in printed.err and printed.err.count("\n") == 1 and printed.out == ""
        assert not (tmp_path / "out").exists()


def test_open_magvit2_of_sizes_that_cannot_be():
    for changes, message in (
        ({"multipliers": ()}, "multipliers is empty"),
        ({"multipliers": (1, 0)}, "a width of 0"),
        ({"image_size": (250, 256)}, "does not divide into patches"),
        ({"num_res_blocks": 0}, "num_res_blocks is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            OpenMAGVIT2Config(**changes)
    tiny = OpenMAGVIT2Config(
        quantizer=LFQConfig(num_bits=3), image_size=(2, 2), channels=32, multipliers=(1, 1), num_res_blocks=1
    )
    module = OpenMAGVIT2(tiny).eval()
    with pytest.raises(ValueError, match="a picture of one code cannot be decoded"):
        module.decode_codes(torch.zeros(1, 1, 1, dtype=torch.long))
    with pytest.raises(ValueError, match=r"codes lie in 0\.\.7"):
        module.decode_codes(torch.full((1, 1, 2), 8))


@pytest.mark.parametrize("build", ["ibq", "open-magvit2"])
def test_every_parameter_gets_a_gradient_from_the_reconstruction_and_the_quantizer(build):
    module = random_module(KINDS[build], CONFIGS[build]).train()
    images, quantized = module(torch.rand(2, 3, 12, 16, generator=torch.Generator().manual_seed(0)))
    (images.square().mean() + quantized.loss).backward()
    without = [name for name, parameter in module.named_parameters() if parameter.grad is None]
    assert without == [] and (build == "open-magvit2" or module.quantizer.codebook.grad.abs().sum(1).gt(0).all())


def test_a_config_of_codes_that_cannot_be():
    with pytest.raises(ValueError, match="entropy_temperature is 0; it must be above 0"):
        IBQConfig(entropy_temperature=0)
    state = foreign_state("ibq")
    with pytest.raises(InputError, match="fit none of the published ibq models"):
        import_foreign(ibq.LAYOUT, state)
