"""Foreign image tokenizers: parity with reference outputs, strictness, safety, and the way back."""

import argparse
import io
import json
import os
import pickle
import shutil
import sys
import types
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from smalti.errors import InputError
from smalti.image_tokenizers.quantizer import FSQConfig
from smalti.image_tokenizers.vqgan import VQGAN
from smalti.interop import deepul, ibq, llamagen_vq, maskgit_vq, open_magvit2, taming, titok, vit_vqgan
from smalti.interop.keys import KeyLayout, export_foreign, import_foreign
from smalti.interop.verifying import ReferenceArrays, compare, read_reference
from smalti.weight_files import read_config, read_weights

SETS = {
    "llamagen_vq": llamagen_vq.LAYOUT,
    "taming_vqgan": taming.LAYOUT,
    "titok": titok.LAYOUT,
    "titok_rgb": titok.LAYOUT,
    "vitvqgan": vit_vqgan.LAYOUT,
    "deepul_vqvae": deepul.LAYOUT,
}

# Sizes that differ from the reference sets wherever they may, under the originals' names.
LLAMAGEN_CONFIG = {
    "ModelArgs": {
        "codebook_size": 31,
        "codebook_embed_dim": 5,
        "codebook_l2_norm": False,
        "codebook_show_usage": False,
        "commit_loss_beta": 0.5,
        "entropy_loss_ratio": 0.1,
        "encoder_ch_mult": [1, 3, 2],
        "decoder_ch_mult": [2, 1, 1],
        "z_channels": 7,
        "dropout_p": 0.1,
    },
    "Encoder_Decoder": {"in_channels": 3, "out_channels": 3, "ch": 32, "num_res_blocks": 2},
    "image_range": [-1.0, 1.0],
}
TAMING_CONFIG = {
    "model": {
        "target": "taming.models.vqgan.VQModel",
        "params": {
            "embed_dim": 5,
            "n_embed": 31,
            "lossconfig": {"target": "anything"},
            "ddconfig": {
                "double_z": False,
                "z_channels": 7,
                "resolution": 24,
                "in_channels": 3,
                "out_ch": 3,
                "ch": 32,
                "ch_mult": [1, 1, 2],
                "num_res_blocks": 2,
                "attn_resolutions": [24, 6],
                "dropout": 0.0,
            },
        },
    }
}
MASKGIT_CONFIG = {
    "pixel_decoder": {
        "channel_mult": [1, 2, 2, 3],
        "num_resolutions": 4,
        "hidden_channels": 32,
        "num_res_blocks": 2,
        "resolution": 24,
        "z_channels": 5,
    },
    "pixel_quantize": {"num_embeddings": 31, "embedding_dim": 5, "commitment_cost": 0.25},
}
TITOK_CONFIG = {
    "config": {
        "model": {
            "vq_model": {
                "codebook_size": 31,
                "token_size": 5,
                "use_l2_norm": False,
                "commitment_cost": 0.5,
                "vit_enc_model_size": "one",
                "vit_dec_model_size": "two",
                "vit_enc_patch_size": 3,
                "vit_dec_patch_size": 4,
                "num_latent_tokens": 7,
            }
        },
        "dataset": {"preprocessing": {"crop_size": [12, 24]}},
    },
    "model_sizes": {
        "one": {"width": 22, "num_layers": 3, "num_heads": 2, "mlp_ratio": 3.0},
        "two": {"width": 15, "num_layers": 1, "num_heads": 3},
    },
    "pixel_decoder": {
        "channel_mult": [1, 2, 1],
        "num_resolutions": 3,
        "hidden_channels": 32,
        "num_res_blocks": 2,
        "resolution": 24,
        "z_channels": 5,
    },
    "pixel_quantize": {"num_embeddings": 13, "embedding_dim": 5},
}
VIT_CONFIG = {
    "image_size": [12, 20],
    "patch_size": 4,
    "encoder": {"dim": 12, "depth": 2, "heads": 3, "mlp_dim": 7, "dim_head": 5},
    "decoder": {"dim": 20, "depth": 1, "heads": 1, "mlp_dim": 11, "dim_head": 20},
    "quantizer": {"embed_dim": 5, "n_embed": 31, "use_norm": False, "beta": 0.5},
}
DEEPUL_CONFIG = {"h_dim": 14, "res_h_dim": 5, "n_res_layers": 3, "n_embeddings": 31, "embedding_dim": 7, "beta": 0.5}
IBQ_CONFIG = {
    "seed_everything": True,
    "model": {
        "class_path": "src.IBQ.models.ibqgan.IBQ",
        "init_args": {
            "ddconfig": {
                "double_z": False,
                "z_channels": 7,
                "resolution": 24,
                "in_channels": 3,
                "out_ch": 3,
                "ch": 32,
                "ch_mult": [1, 2, 2],
                "num_res_blocks": 3,
                "attn_resolutions": [6],
                "dropout": 0.0,
            },
            "lossconfig": {"target": "anything", "params": {"entropy_loss_weight": 0.05}},
            "n_embed": 31,
            "embed_dim": 5,
            "learning_rate": "1e-4",
            "l2_normalize": False,
            "use_entropy_loss": True,
            "sample_minimization_weight": 1.0,
            "batch_maximization_weight": 1.0,
            "entropy_temperature": 0.02,
            "beta": 0.5,
            "use_ema": True,
            "resume_lr": None,
            "lr_drop_epoch": [250, 300],
        },
    },
    "data": {"class_path": "main.DataModuleFromConfig", "init_args": {"batch_size": 4}},
    "ckpt_path": None,
}
MAGVIT2_CONFIG = {
    "model": {
        "class_path": "src.Open_MAGVIT2.models.lfqgan.VQModel",
        "init_args": {
            "ddconfig": {
                "double_z": False,
                "z_channels": 5,
                "resolution": 128,
                "in_channels": 3,
                "out_ch": 3,
                "ch": 32,
                "ch_mult": [1, 3, 2],
                "num_res_blocks": 2,
            },
            "lossconfig": {"target": "anything"},
            "n_embed": 32,
            "embed_dim": 5,
            "learning_rate": "1e-4",
            "sample_minimization_weight": 1.0,
            "batch_maximization_weight": 1.0,
            "scheduler_type": "None",
            "use_ema": True,
            "sche_type": "cos",
            "wpe": 0.01,
            "max_iter": None,
        },
    },
    "data": {"init_args": {"validation": {"target": "anything", "params": {"config": {"size": 24, "subset": None}}}}},
}
OTHER_SIZES = {
    "llamagen-vq": (llamagen_vq.LAYOUT, LLAMAGEN_CONFIG),
    "taming": (taming.LAYOUT, TAMING_CONFIG),
    "maskgit-vq": (maskgit_vq.LAYOUT, MASKGIT_CONFIG),
    "titok": (titok.LAYOUT, TITOK_CONFIG),
    "vit-vqgan": (vit_vqgan.LAYOUT, VIT_CONFIG),
    "ibq": (ibq.LAYOUT, IBQ_CONFIG),
    "open-magvit2": (open_magvit2.LAYOUT, MAGVIT2_CONFIG),
    "deepul": (deepul.LAYOUT, DEEPUL_CONFIG),
}


def random_module(layout: KeyLayout, config: dict) -> torch.nn.Module:
    torch.manual_seed(0)
    module = layout.build(layout.read_config(config)).eval()
    for name, tensor in module.state_dict().items():
        scale = tensor.shape[-1] ** -0.5 if tensor.ndim == 2 else 0.1
        tensor.copy_(scale * torch.randn_like(tensor) + ("norm" in name and name.endswith("weight")))
    return module


def tiny_state(name: str = "taming") -> tuple[KeyLayout, dict, dict[str, torch.Tensor]]:
    layout, config = OTHER_SIZES[name]
    return layout, config, export_foreign(layout, random_module(layout, config))


# Parity with the reference sets


@pytest.mark.parametrize("name", SETS)
def test_reference_sets_are_reproduced(shared_dir, name):
    module, arrays = read_reference(SETS[name], shared_dir / "golden" / name)
    errors = compare(SETS[name], module, arrays)
    inputs = {"image", "image_nonsquare", "random_indices"}
    assert {error.name for error in errors} == set(arrays) - inputs
    assert [error for error in errors if not error.holds] == []


@pytest.mark.parametrize("name", SETS)
def test_a_perturbed_weight_is_detected(shared_dir, name):
    module, arrays = read_reference(SETS[name], shared_dir / "golden" / name)
    for layer in (module.to_code, module.decoder[0] if name == "deepul_vqvae" else module.from_code):
        before = layer.weight.detach().clone()
        layer.weight.data.view(-1)[0] += 0.05
        assert not all(error.holds for error in compare(SETS[name], module, arrays))
        layer.weight.data.copy_(before)
    assert all(error.holds for error in compare(SETS[name], module, arrays))


@pytest.mark.parametrize("name", SETS)
def test_export_of_a_reference_set_is_the_file_bit_for_bit(shared_dir, name):
    layout, folder = SETS[name], shared_dir / "golden" / name
    file = next(path for path in folder.iterdir() if path.stem in ("weights", "model"))
    original = read_weights(file).tensors
    module, report = import_foreign(layout, original, read_config(folder / "config.json"))
    exported = export_foreign(layout, module)
    assert set(exported) == set(original) - {key for key, _ in report.dropped}
    assert all(torch.equal(exported[key], original[key]) for key in exported)


def test_attention_levels_where_the_resolution_does_not_halve_evenly():
    # 50 -> 25 -> 12 on the way down, 12 -> 24 -> 48 on the way up, in the original's arithmetic.
    config = json.loads(json.dumps(TAMING_CONFIG))
    ddconfig = config["model"]["params"]["ddconfig"]
    ddconfig |= {"resolution": 50, "attn_resolutions": [25, 12]}
    ours = taming.read_config(config)
    assert (ours.encoder_attention_levels, ours.decoder_attention_levels) == ((1, 2), (2,))
    assert ours.image_size == (48, 48)
    ddconfig["attn_resolutions"] = []
    assert taming.read_config(config).encoder_attention_levels == ()


# The way back


@pytest.mark.parametrize("name", OTHER_SIZES)
def test_import_of_export_is_bit_equal(name):
    layout, config = OTHER_SIZES[name]
    module = random_module(layout, config)
    again, report = import_foreign(layout, export_foreign(layout, module), layout.write_config(module))
    assert again.config == module.config
    assert len(report.moved) >= len(module.state_dict())
    assert all(torch.equal(again.state_dict()[key], tensor) for key, tensor in module.state_dict().items())


def test_what_a_layout_cannot_hold_is_refused():
    module = random_module(taming.LAYOUT, TAMING_CONFIG)  # attention at two levels, which LlamaGen does not have
    with pytest.raises(ValueError, match=r"llamagen-vq layout cannot hold encoder_attention_levels \(0, 2\)"):
        export_foreign(llamagen_vq.LAYOUT, module)


def test_a_proxy_of_another_form_is_refused():
    config = titok.read_config(TITOK_CONFIG)
    config = replace(config, proxy=replace(config.proxy, form="llamagen"))
    with pytest.raises(ValueError, match="titok layout cannot hold proxy VQGANConfig"):
        export_foreign(titok.LAYOUT, titok.LAYOUT.build(config))


def test_latents_that_start_from_regions_are_refused():
    config = replace(titok.read_config(TITOK_CONFIG), num_latents=2, regional=True)
    with pytest.raises(ValueError, match="titok layout cannot hold regional True; it would be read as False"):
        export_foreign(titok.LAYOUT, titok.LAYOUT.build(config))


def test_a_codebook_with_running_means_is_exported_without_them():
    config = llamagen_vq.read_config(LLAMAGEN_CONFIG)
    module = VQGAN(replace(config, quantizer=replace(config.quantizer, update="ema")))
    state = export_foreign(llamagen_vq.LAYOUT, module)
    assert not [key for key in state if "ema" in key]
    again, _ = import_foreign(llamagen_vq.LAYOUT, state, LLAMAGEN_CONFIG)
    assert torch.equal(again.quantizer.codebook, module.quantizer.codebook)


def test_codes_without_a_learned_codebook_are_refused():
    config = llamagen_vq.read_config(LLAMAGEN_CONFIG)
    module = VQGAN(replace(config, quantizer=FSQConfig(levels=(5, 3))))
    with pytest.raises(ValueError, match="layout holds a learned codebook; this tokenizer's codes are 'fsq'"):
        export_foreign(llamagen_vq.LAYOUT, module)


# Strictness


def test_every_missing_unexpected_and_misshapen_key_is_named():
    layout, config, state = tiny_state()
    state["quant_conv.bias"] = torch.zeros(6)
    del state["encoder.conv_in.weight"]
    state["encoder.extra"] = torch.zeros(2, 3)
    with pytest.raises(InputError) as error:
        import_foreign(layout, state, config)
    message = str(error.value)
    assert "3 tensors differ" in message
    assert "missing: encoder.conv_in.weight [32, 3, 3, 3]" in message
    assert "unexpected: encoder.extra [2, 3]" in message
    assert "shape: quant_conv.bias is [6], expected [5]" in message


def test_the_report_names_each_tensor_and_why_one_was_dropped():
    layout, config, state = tiny_state()
    state["loss.discriminator.main.0.weight"] = torch.zeros(3)
    _, report = import_foreign(layout, state, config)
    assert (
        "decoder.up.2.block.0.conv1.weight -> decoder.levels.0.blocks.0.conv1.weight [64, 64, 3, 3]" in report.lines()
    )
    assert "loss.discriminator.main.0.weight dropped: part of the training loss" in report.lines()
    assert len(report.moved) == len(state) - 1


@pytest.mark.parametrize(("name", "prefix"), [("llamagen-vq", "gen_vision_model."), ("taming", "first_stage_model.")])
def test_a_tokenizer_inside_a_larger_model_is_found(name, prefix):
    layout, config, state = tiny_state(name)
    larger = {f"{prefix}{key}": tensor for key, tensor in state.items()} | {"transformer.head.weight": torch.zeros(2)}
    module, report = import_foreign(layout, larger, config)
    assert torch.equal(module.quantizer.codebook, state["quantize.embedding.weight"])
    assert report.dropped == (("transformer.head.weight", f"outside {prefix}"),)


def test_a_layer_used_several_times_must_be_listed_alike():
    layout, _, state = tiny_state("deepul")
    again, report = import_foreign(layout, state)
    assert again.config.residual_layers == 3
    assert report.sizes == "from the shapes of the weights"
    assert len(report.moved) == len(state)
    state["encoder.conv_stack.5.stack.2.res_block.1.weight"] += 1
    with pytest.raises(InputError, match=r"unequal: encoder.conv_stack.5.stack.2.res_block.1.weight should repeat"):
        import_foreign(layout, state)


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        (llamagen_vq.LAYOUT, {"ModelArgs": {"codebook_sise": 3}}, "config.ModelArgs.codebook_sise is not a field"),
        (llamagen_vq.LAYOUT, {"ModelArgs": {"codebook_size": "3"}}, "codebook_size is '3'; expected int"),
        (llamagen_vq.LAYOUT, {"Encoder_Decoder": {"norm_type": "batch"}}, "norm_type is 'batch'; only 'group'"),
        (llamagen_vq.LAYOUT, {"image_range": [0, 1]}, "config.image_range"),
        (taming.LAYOUT, {"class": "taming.models.vqgan.GumbelVQ"}, "this kind reads taming.models.vqgan.VQModel"),
        (taming.LAYOUT, {"model": {"params": {"n_embed": 3, "embed_dim": 2}}}, "no section 'ddconfig'"),
        (maskgit_vq.LAYOUT, {"pixel_decoder": {"num_resolutions": 3}}, "num_resolutions is 3; only 5"),
        (vit_vqgan.LAYOUT, {"quantizer": {**VIT_CONFIG["quantizer"], "use_residual": True}}, "use_residual is True"),
        (vit_vqgan.LAYOUT, {"patch_size": [4, 5]}, "patch_size is 4 x 5; only squares"),
        (vit_vqgan.LAYOUT, {"decoder": {**VIT_CONFIG["decoder"], "channels": 1}}, "decoder.channels 1"),
        (
            ibq.LAYOUT,
            {"model": {"class_path": "src.IBQ.models.ibqgan.VQModel", "init_args": {}}},
            "this kind reads IBQ",
        ),
        (ibq.LAYOUT, {"n_embed": 3, "embed_dim": 2}, "no section 'ddconfig'"),
        (ibq.LAYOUT, {**IBQ_CONFIG["model"]["init_args"], "remap": "used.npy"}, "remap is 'used.npy'; only None"),
        (ibq.LAYOUT, {**IBQ_CONFIG["model"]["init_args"], "legacy": True}, "legacy is not a field known here"),
        (open_magvit2.LAYOUT, {**MAGVIT2_CONFIG["model"]["init_args"], "n_embed": 33}, "5 channels of signs make 32"),
        (open_magvit2.LAYOUT, {"class": "src.IBQ.models.ibqgan.IBQ"}, "this kind reads src.Open_MAGVIT2"),
    ],
)
def test_config_values_that_are_not_understood_are_named(layout, change, message):
    base = {vit_vqgan.LAYOUT.name: VIT_CONFIG}.get(layout.name, {})
    with pytest.raises(InputError, match=message):
        layout.read_config({**base, **change})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("vit_enc_model_size", "giant", "vit_enc_model_size is 'giant'; known are small, base, large, one, two"),
        ("quantize_mode", "vae", "quantize_mode is 'vae'; only 'vq'"),
        ("is_legacy", False, "is_legacy False and finetune_decoder True"),
        ("text_guidance", 1, "vq_model.text_guidance is not a field known here"),
    ],
)
def test_titok_config_values_that_are_not_understood_are_named(field, value, message):
    config = json.loads(json.dumps(TITOK_CONFIG))
    config["config"]["model"]["vq_model"][field] = value
    with pytest.raises(InputError, match=message):
        titok.read_config(config)


def test_bare_and_nested_configs_mean_the_same():
    assert llamagen_vq.read_config({"codebook_size": 31}) == llamagen_vq.read_config(
        {"ModelArgs": {"codebook_size": 31}}
    )
    params = TAMING_CONFIG["model"]["params"]
    assert taming.read_config(params) == taming.read_config(TAMING_CONFIG)
    nested = {"model": {"params": VIT_CONFIG}, "quantizer_defaults": {"beta": 0.25, "use_norm": True}}
    assert vit_vqgan.read_config(nested) == vit_vqgan.read_config(VIT_CONFIG)


# Published sizes


@pytest.mark.parametrize(
    ("layout", "name"),
    [(layout, name) for layout, _ in OTHER_SIZES.values() for name in layout.published],
)
def test_published_sizes_are_known_by_their_shapes_alone(layout, name):
    with torch.device("meta"):
        module = layout.build(layout.published[name])
        state = {foreign.key: torch.empty(foreign.shape) for foreign in layout.key_map(module).values()}
        _, report = import_foreign(layout, state)
    assert name in report.sizes


def test_unpublished_sizes_without_a_config_are_refused():
    layout, _, state = tiny_state()
    with pytest.raises(InputError, match=r"fit none of the published taming models. Closest is f"):
        import_foreign(layout, state)


def test_ambiguous_sizes_are_refused():
    layout, _, state = tiny_state()
    config = taming.read_config(TAMING_CONFIG)
    twice = replace(layout, published={"one": config, "other": config})
    with pytest.raises(InputError, match=r"fit several published taming models \(one, other\)"):
        import_foreign(twice, state)


# Containers


CONTAINERS = {
    "bare": lambda state: state,
    "model": lambda state: {"model": state, "steps": 3, "args": argparse.Namespace(lr=0.1)},
    "module": lambda state: {"module": state},
    "lightning": lambda state: {"state_dict": state, "epoch": 1, "hyper_parameters": {"lr": 0.1}},
    "ddp": lambda state: {"model": {f"module.{key}": tensor for key, tensor in state.items()}},
    "compiled ddp": lambda state: {f"_orig_mod.module.{key}": tensor for key, tensor in state.items()},
    "compiled parts": lambda state: {key.replace(".", "._orig_mod.", 1): tensor for key, tensor in state.items()},
    "sharded": lambda state: {f"_fsdp_wrapped_module.{key}": tensor for key, tensor in state.items()},
    "sharded parts": lambda state: {
        key.replace(".", "._fsdp_wrapped_module._checkpoint_wrapped_module.", 1): t for key, t in state.items()
    },
    "deeper in": lambda state: {"net": {"params": state}, "steps": 3},
    "averaged": lambda state: {
        "n_averaged": torch.tensor(3),
        **{f"module.{key}": tensor for key, tensor in state.items()},
    },
}
STATE = {"encoder.weight": torch.arange(6.0).view(2, 3), "decoder.bias": torch.arange(5.0)}


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_is_read(tmp_path, container):
    file = tmp_path / "weights.pt"
    torch.save(CONTAINERS[container](STATE), file)
    read = read_weights(file).tensors
    assert set(read) == set(STATE)
    assert all(torch.equal(read[key], STATE[key]) for key in STATE)


def test_old_files_and_safetensors_of_any_name_are_read(tmp_path):
    torch.save(STATE, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(STATE, tmp_path / "weights.bin")
    for name in ("old.pt", "weights.bin"):
        assert torch.equal(read_weights(tmp_path / name).tensors["decoder.bias"], STATE["decoder.bias"])


def test_averaged_weights_are_chosen_and_it_is_said(tmp_path):
    averaged = {key: tensor + 1 for key, tensor in STATE.items()}
    torch.save({"model": STATE, "ema": averaged, "steps": 7}, tmp_path / "weights.pt")
    weights = read_weights(tmp_path / "weights.pt")
    assert torch.equal(weights.tensors["decoder.bias"], averaged["decoder.bias"])
    assert weights.notes == (
        "averaged (EMA) weights taken from `ema`, not the last ones",
        "passed over beside it: model, steps",
    )


@pytest.mark.parametrize("form", ["shadow", "LitEma"])
def test_averaged_weights_within_other_things_are_chosen_too(tmp_path, form):
    averaged = {key: tensor + 1 for key, tensor in STATE.items()}
    if form == "shadow":
        content = {"model": STATE, "ema": {"decay": 0.99, "shadow": averaged}}
    else:
        kept = {f"model_ema.{key.replace('.', '')}": tensor for key, tensor in averaged.items()}
        content = {"state_dict": {**STATE, **kept, "model_ema.decay": torch.tensor(0.99)}}
    torch.save(content, tmp_path / "weights.pt")
    weights = read_weights(tmp_path / "weights.pt")
    assert set(weights.tensors) == set(STATE)
    assert all(torch.equal(weights.tensors[key], averaged[key]) for key in STATE)
    assert any("averaged (EMA) weights taken from" in note for note in weights.notes)


def test_weights_that_are_not_finite_or_quantized_are_refused_by_name():
    layout, config = taming.LAYOUT, TAMING_CONFIG
    torch.manual_seed(0)
    state = export_foreign(layout, layout.build(layout.read_config(config)))
    broken = dict(state)
    broken["decoder.conv_in.bias"] = torch.full_like(state["decoder.conv_in.bias"], float("nan"))
    broken["decoder.conv_out.bias"] = torch.full_like(state["decoder.conv_out.bias"], float("inf"))
    message = r"decoder\.conv_in\.bias holds \d+ of \d+ values .*, and so do 1 other tensors: .*--allow-nonfinite"
    with pytest.raises(InputError, match=message):
        import_foreign(layout, broken, config)
    _, report = import_foreign(layout, broken, config, allow_nonfinite=True)
    assert any("decoder.conv_in.bias holds" in note for note in report.notes)
    whole = {**state, "decoder.conv_in.bias": torch.zeros_like(state["decoder.conv_in.bias"], dtype=torch.int8)}
    with pytest.raises(InputError, match=r"decoder\.conv_in\.bias holds int8, .*quantized weights are not read"):
        import_foreign(layout, whole, config)


def gumbel_of(state, num_codes, code_dim):
    """A GumbelVQ with the encoder and decoder of `state`."""
    random = torch.Generator().manual_seed(0)
    others = {key: tensor for key, tensor in state.items() if not key.startswith("quantize.")}
    return others | {
        "quantize.embed.weight": torch.randn(num_codes, code_dim, generator=random),
        "quantize.proj.weight": torch.randn(num_codes, code_dim, 1, 1, generator=random),
        "quantize.proj.bias": torch.randn(num_codes, generator=random),
    }


def test_gumbel_codes_are_those_of_the_largest_logit_and_decode_to_its_embedding():
    config = json.loads(json.dumps(TAMING_CONFIG))
    params = config["model"]["params"] if "model" in config else config
    num_codes, code_dim = params["n_embed"], params["embed_dim"]
    torch.manual_seed(0)
    plain = taming.LAYOUT.build(taming.read_config(config)).eval()
    state = gumbel_of(export_foreign(taming.LAYOUT, plain), num_codes, code_dim)
    params |= {"kl_weight": 1e-8, "temperature_scheduler_config": {}}
    gumbel, _ = import_foreign(taming.LAYOUT, state, config)
    images = torch.rand(2, 3, *plain.config.image_size)
    with torch.inference_mode():
        latents = plain.encode_latents(images)  # (B, h, w, Z)
        logits = latents @ state["quantize.proj.weight"].flatten(1).T + state["quantize.proj.bias"]
        codes = gumbel.encode_images(images)
        assert torch.equal(codes, logits.argmax(-1))
        assert len(codes.unique()) > 2
        plain.quantizer.codebook.copy_(state["quantize.embed.weight"])
        torch.testing.assert_close(gumbel.decode_codes(codes), plain.decode_codes(codes))
    wrong = {**state, "quantize.proj.weight": torch.zeros(num_codes, code_dim + 1, 1, 1)}
    with pytest.raises(InputError, match="a GumbelVQ has one row of each for every code"):
        import_foreign(taming.LAYOUT, wrong, config)


def test_a_config_of_a_transformer_on_codes_gives_its_image_tokenizers():
    torch.manual_seed(0)
    params = TAMING_CONFIG["model"]["params"] if "model" in TAMING_CONFIG else TAMING_CONFIG
    plain = taming.LAYOUT.build(taming.read_config(TAMING_CONFIG))
    state = export_foreign(taming.LAYOUT, plain)
    learned = {"quantize.embedding.cluster_size": torch.ones(3), "quantize.embedding.embed_avg": torch.ones(3)}
    whole = {f"first_stage_model.{key}": tensor for key, tensor in (state | learned).items()}
    whole |= {f"cond_stage_model.{key}": tensor + 1 for key, tensor in state.items()}
    stage = {"target": "taming.models.vqgan.EMAVQ", "params": params}
    target = "taming.models.cond_transformer.Net2NetTransformer"
    config = {"model": {"target": target, "params": {"first_stage_config": stage, "transformer_config": {}}}}
    found, report = import_foreign(taming.LAYOUT, whole, config)
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in found.state_dict().items())
    assert len(report.dropped) == len(state) + 2
    stage["target"] = "ldm.models.autoencoder.AutoencoderKL"
    with pytest.raises(InputError, match=r"config\.model\.target is ldm\.models\.autoencoder\.AutoencoderKL"):
        import_foreign(taming.LAYOUT, whole, config)


def test_lightning_objects_beside_the_weights_are_passed_over(tmp_path, monkeypatch):
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")

    class ModelCheckpoint:
        def __init__(self):
            self.best = 0.5

    ModelCheckpoint.__module__, ModelCheckpoint.__qualname__ = module.__name__, "ModelCheckpoint"
    module.ModelCheckpoint = ModelCheckpoint
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    torch.save(
        {
            "state_dict": STATE,
            "callbacks": {ModelCheckpoint: {"best_model_score": np.float64(0.5)}, "instance": ModelCheckpoint()},
        },
        tmp_path / "last.ckpt",
    )
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
        monkeypatch.delitem(sys.modules, name)
    assert set(read_weights(tmp_path / "last.ckpt").tensors) == set(STATE)


def zip_of(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, "text")
    return buffer.getvalue()


class Malicious:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("writer", ["zip", "old", "plain pickle"])
def test_a_malicious_pickle_is_refused_and_nothing_runs(tmp_path, writer):
    file, target = tmp_path / "weights.pt", tmp_path / "was_here"
    if writer == "plain pickle":
        file.write_bytes(pickle.dumps(Malicious(target), protocol=2))
    else:
        torch.save(
            {"state_dict": STATE, "callbacks": Malicious(target)}, file, _use_new_zipfile_serialization=writer == "zip"
        )
    with pytest.raises(
        InputError, match=r"weights.pt is refused and nothing in it was run: it asks to load \S*mkdir"
    ) as error:
        read_weights(file)
    assert "\n" not in str(error.value)
    assert not target.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a weight file at all", "cannot be read as a PyTorch weight file: it is no pickle"),
        (b"PK\x03\x04 broken", "cannot be read as a PyTorch weight file: it is cut short or damaged"),
        (b"\x08\x00\x00\x00\x00\x00\x00\x00{broken}", "cannot be read as safetensors: .*it has 16 bytes"),
        (b"", "is an empty file, not weights: fetch it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "is a git-lfs pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html>sign in</html>", "is a web page.*download the file itself"),
        (b"GGUF\x03\0\0\0", "is a GGUF file of llama.cpp, not weights: take the original"),
        (b"a/b" + bytes(254) + b"ustar" + bytes(250), "is a tar archive, not weights: unpack it"),
        (b"\x1f\x8b" + bytes(20), "is a gzip-compressed file, not weights: unpack it"),
        (zip_of("readme.txt"), "it is a zip archive of other things; unpack it"),
    ],
)
def test_broken_files_are_named(tmp_path, content, message):
    file = tmp_path / "weights.bin"
    file.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_weights(file)
    assert "trust" not in str(error.value), "nobody's author is to be trusted for a file that asks for nothing"


def test_files_without_a_state_dict_say_what_they_hold(tmp_path):
    torch.save({"optimizer": {"lr": 0.1}, "steps": 3}, tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"holds no state dict.*found optimizer, steps"):
        read_weights(tmp_path / "a.pt")
    torch.save(torch.zeros(3), tmp_path / "b.pt")
    with pytest.raises(InputError, match="holds a Tensor, not a state dict"):
        read_weights(tmp_path / "b.pt")
    with pytest.raises(InputError, match="is not a file"):
        read_weights(tmp_path / "absent.pt")


def test_configs_are_read_from_json_yaml_and_saved_arguments(tmp_path):
    values = {"h_dim": 3, "nested": {"beta": 0.5}}
    (tmp_path / "c.json").write_text(json.dumps(values))
    (tmp_path / "c.yaml").write_text("h_dim: 3\nnested: {beta: 0.5}\n")
    torch.save(argparse.Namespace(**values), tmp_path / "c.pt")
    assert all(read_config(tmp_path / f"c.{ending}") == values for ending in ("json", "yaml", "pt"))
    (tmp_path / "c.json").write_text("[1]")
    with pytest.raises(InputError, match="holds a list, expected a mapping"):
        read_config(tmp_path / "c.json")
    (tmp_path / "c.json").write_text("{")
    with pytest.raises(InputError, match=r"c\.json is not JSON: .*config, in JSON or YAML"):
        read_config(tmp_path / "c.json")


# Verifying


def make_reference(folder: Path) -> ReferenceArrays:
    """A reference folder of our own making, of other sizes than the open sets."""
    layout, config, state = tiny_state("vit-vqgan")
    module, _ = import_foreign(layout, state, config)
    arrays = ReferenceArrays(image=torch.rand(2, 3, 12, 20), random_indices=torch.randint(31, (2, 15)))
    arrays |= {"indices": torch.zeros(2, 15, dtype=torch.long), "random_decoded": torch.zeros(2, 3, 12, 20)}
    arrays |= {"decoded": torch.zeros(2, 3, 12, 20)}
    outputs = layout.outputs(module, arrays)
    with torch.inference_mode():
        for name in ("indices", "z_e", "z_q", "codebook_loss", "decoded", "random_decoded", "encoder_features"):
            arrays[name] = outputs[name]()
    folder.mkdir()
    torch.save({"state_dict": state}, folder / "weights.pt")
    (folder / "config.json").write_text(json.dumps(config))
    write_arrays(folder, arrays)
    return arrays


def write_arrays(folder: Path, arrays: dict[str, torch.Tensor]) -> None:
    np.savez(folder / "io.npz", **{name: tensor.numpy() for name, tensor in arrays.items()})


def test_verify_works_for_other_sizes_and_sees_each_array_that_differs(tmp_path):
    arrays = make_reference(tmp_path / "reference")
    layout = vit_vqgan.LAYOUT
    module, read = read_reference(layout, tmp_path / "reference")
    assert all(error.holds for error in compare(layout, module, read))
    read["z_e"] = arrays["z_e"] + 2e-4
    read["indices"] = (arrays["indices"] + 1) % 31
    read["codebook_loss"] = torch.tensor(float("nan"))
    read["encoder_features"] = arrays["encoder_features"][:, :8]
    errors = {error.name: error for error in compare(layout, module, read)}
    assert not errors["z_e"].holds
    assert errors["z_e"].largest_error == pytest.approx(2e-4, rel=0.1)
    assert errors["indices"].largest_error == 30
    assert not errors["codebook_loss"].holds
    assert errors["encoder_features"].largest_error == float("inf")
    assert errors["z_q"].holds


def test_unknown_arrays_and_absent_inputs_are_named(tmp_path):
    arrays = make_reference(tmp_path / "reference")
    layout = vit_vqgan.LAYOUT
    module, read = read_reference(layout, tmp_path / "reference")
    with pytest.raises(InputError, match=r"io.npz holds surprise, which is not known for vit-vqgan"):
        compare(layout, module, ReferenceArrays(arrays, surprise=torch.zeros(1)))
    with pytest.raises(InputError, match=r"indices \[2, 15\] does not fill the grid of 2 x 5 codes of decoded"):
        compare(layout, module, ReferenceArrays(arrays, decoded=arrays["decoded"][:, :, :8]))
    with pytest.raises(InputError, match="no outputs, so there is nothing to verify"):
        compare(layout, module, ReferenceArrays(image=arrays["image"]))
    del read["image"]
    with pytest.raises(InputError, match="no array 'image'"):
        compare(layout, module, read)


def test_arrays_that_need_unpickling_are_refused(tmp_path):
    make_reference(tmp_path / "reference")
    np.savez(tmp_path / "reference" / "io.npz", image=np.array([{"a": 1}], dtype=object))
    with pytest.raises(InputError, match=r"io.npz is no whole .npz file: Object arrays"):
        read_reference(vit_vqgan.LAYOUT, tmp_path / "reference")


def test_a_folder_with_two_weight_files_is_refused(tmp_path):
    make_reference(tmp_path / "reference")
    shutil.copy(tmp_path / "reference" / "weights.pt", tmp_path / "reference" / "weights.bin")
    with pytest.raises(InputError, match="holds 2 weight files"):
        read_reference(vit_vqgan.LAYOUT, tmp_path / "reference")
