"""`smalti import --verify` on reference folders of many sizes, whose arrays `original_networks` made."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from original_networks import (
    llamagen_sides,
    maskgit_sides,
    quantizer_terms,
    run_deepul,
    run_grid,
    run_titok,
    run_vit_vqgan,
    sine_positions,
    taming_sides,
)
from safetensors.torch import save_file
from torch import Tensor

from smalti.cli.app import run
from smalti.image_tokenizers import load_image_tokenizer
from smalti.interop.commands import KINDS
from smalti.interop.keys import export_foreign, import_foreign

State = dict[str, Tensor]
Arrays = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A reference folder to be: `arrays` makes its inputs and outputs from its weights."""

    kind: str
    config: dict
    arrays: Callable[[State, torch.Generator], Arrays]


def pictures(generator: torch.Generator, *size: int, low: float = 0.0) -> Tensor:
    return low + (1 - low) * torch.rand(2, 3, *size, generator=generator)


def grid_case(
    kind: str, config: dict, sides: Callable, size: tuple[int, int], other: tuple[int, int], patch: int, **codes
):
    """A convolutional tokenizer; `codes` holds codebook_size, l2_normalised and the weights of the losses' arrays."""
    low = 0.0 if kind == "maskgit-vq" else -1.0

    def arrays(state, generator):
        num_codes = (size[0] // patch) * (size[1] // patch)
        inputs = {
            "image": pictures(generator, *size, low=low),
            "image_nonsquare": pictures(generator, *other, low=low),
            "random_indices": torch.randint(codes["codebook_size"], (2, num_codes), generator=generator),
        }
        encode, decode = sides(state)
        codebook, l2_normalised = state["quantize.embedding.weight"], codes.get("l2_normalised", False)
        outputs = run_grid((encode, decode), codebook, l2_normalised, **inputs)
        squared = quantizer_terms(encode(inputs["image"]), codebook, l2_normalised)
        outputs |= {name: weight * squared for name, weight in codes["losses"].items()}
        return {**inputs, **outputs}

    return Case(kind=kind, config=config, arrays=arrays)


def llamagen_case(ch, encoder, decoder, blocks, K, E, z, size, other, *, normalised=True, beta=0.25, bare=False):
    args = {
        "codebook_size": K,
        "codebook_embed_dim": E,
        "codebook_l2_norm": normalised,
        "commit_loss_beta": beta,
        "encoder_ch_mult": encoder,
        "decoder_ch_mult": decoder,
        "z_channels": z,
    }
    config = {"ModelArgs": args, "Encoder_Decoder": {"ch": ch, "num_res_blocks": blocks}, "image_range": [-1.0, 1.0]}
    if bare:
        assert (ch, blocks) == (128, 2)
        config = args
    return grid_case(
        "llamagen-vq",
        config,
        lambda state: llamagen_sides(state, len(encoder), len(decoder), blocks),
        size,
        other,
        2 ** (len(encoder) - 1),
        codebook_size=K,
        l2_normalised=normalised,
        losses={"vq_loss": 1.0, "commit_loss": beta},
    )


def taming_case(ch, multipliers, blocks, resolution, attention, K, E, z, size, other):
    network = {
        "double_z": False,
        "z_channels": z,
        "resolution": resolution,
        "in_channels": 3,
        "out_ch": 3,
        "ch": ch,
        "ch_mult": multipliers,
        "num_res_blocks": blocks,
        "attn_resolutions": attention,
        "dropout": 0.0,
    }
    return grid_case(
        "taming",
        {"model": {"params": {"embed_dim": E, "n_embed": K, "ddconfig": network}}, "image_range": [-1.0, 1.0]},
        lambda state: taming_sides(state, resolution, attention, len(multipliers), blocks),
        size,
        other,
        2 ** (len(multipliers) - 1),
        codebook_size=K,
        losses={"codebook_loss": 1.25},
    )


def maskgit_case(ch, multipliers, blocks, K, E, size, other):
    network = {
        "channel_mult": multipliers,
        "num_resolutions": len(multipliers),
        "hidden_channels": ch,
        "num_res_blocks": blocks,
        "resolution": list(size),
        "z_channels": E,
    }
    return grid_case(
        "maskgit-vq",
        {"pixel_decoder": network, "pixel_quantize": {"num_embeddings": K, "embedding_dim": E}},
        lambda state: maskgit_sides(state, len(multipliers), blocks),
        size,
        other,
        2 ** (len(multipliers) - 1),
        codebook_size=K,
        losses={"codebook_loss": 1.25},
    )


def titok_case(encoder, decoder, patch, n, K, E, size, *, normalised=True, proxy=None):
    """`encoder` and `decoder` are (width, layers, heads, mlp_ratio), `proxy` is (ch, multipliers, blocks, P, F)."""
    model = {
        "codebook_size": K,
        "token_size": E,
        "use_l2_norm": normalised,
        "vit_enc_model_size": "one",
        "vit_dec_model_size": "two",
        "vit_enc_patch_size": patch,
        "vit_dec_patch_size": patch,
        "num_latent_tokens": n,
        **({} if proxy else {"finetune_decoder": False, "is_legacy": False}),
    }
    names = ("width", "num_layers", "num_heads", "mlp_ratio")
    config = {
        "class": "modeling.titok.TiTok",
        "config": {
            "model": {"vq_model": model},
            "dataset": {"preprocessing": {"crop_size": size[0] if size[0] == size[1] else list(size)}},
        },
        "model_sizes": {
            "one": dict(zip(names, encoder, strict=True)),
            "two": dict(zip(names, decoder, strict=True)),
        },
    }
    if proxy:
        ch, multipliers, blocks, num_codes, width = proxy
        config["pixel_decoder"] = {
            "channel_mult": multipliers,
            "num_resolutions": len(multipliers),
            "hidden_channels": ch,
            "num_res_blocks": blocks,
            "resolution": list(size),
            "z_channels": width,
        }
        config["pixel_quantize"] = {"num_embeddings": num_codes, "embedding_dim": width, "commitment_cost": 0.25}

    def arrays(state, generator):
        inputs = {
            "image": pictures(generator, *size),
            "random_indices": torch.randint(K, (2, 1, n), generator=generator),
        }
        return {**inputs, **run_titok(state, config, **inputs)}

    return Case(kind="titok", config=config, arrays=arrays)


def vit_case(encoder, decoder, patch, size, K, E, *, normalised=True, beta=0.25):
    """`encoder` and `decoder` are (dim, depth, heads, mlp_dim, dim_head)."""
    names = ("dim", "depth", "heads", "mlp_dim", "dim_head")
    config = {
        "image_size": size[0] if size[0] == size[1] else list(size),
        "patch_size": patch,
        "encoder": dict(zip(names, encoder, strict=True)),
        "decoder": dict(zip(names, decoder, strict=True)),
        "quantizer": {"embed_dim": E, "n_embed": K, "use_norm": normalised, "beta": beta},
    }
    rows, columns = size[0] // patch, size[1] // patch

    def arrays(state, generator):
        inputs = {
            "image": pictures(generator, *size),
            "random_indices": torch.randint(K, (2, rows * columns), generator=generator),
        }
        assert torch.allclose(state["encoder.en_pos_embedding"], sine_positions(encoder[0], rows, columns))
        assert torch.allclose(state["decoder.de_pos_embedding"], sine_positions(decoder[0], rows, columns))
        return {**inputs, **run_vit_vqgan(state, config, **inputs)}

    return Case(kind="vit-vqgan", config=config, arrays=arrays)


def deepul_case(width, residual_width, layers, K, E):
    args = {"h_dim": width, "res_h_dim": residual_width, "n_res_layers": layers, "n_embeddings": K, "embedding_dim": E}

    def arrays(state, generator):
        inputs = {
            "image": torch.randint(4, (2, 28, 28, 3), generator=generator, dtype=torch.uint8),
            "random_indices": torch.randint(K, (2, 7, 7), generator=generator),
        }
        return {**inputs, **run_deepul(state, layers, **inputs)}

    return Case(kind="deepul", config={"args": args, "image_values": [0, 1, 2, 3]}, arrays=arrays)


CASES = {
    "llamagen as VQ-16": llamagen_case(32, [1, 1, 2, 2, 4], [1, 1, 2, 2, 4], 2, 97, 8, 64, (48, 48), (32, 64)),
    "llamagen as VQ-8": llamagen_case(32, [1, 2, 2, 4], [1, 2, 2, 4], 2, 61, 8, 32, (40, 40), (16, 24)),
    "llamagen of two levels": llamagen_case(64, [1, 2], [1, 1], 1, 11, 3, 17, (10, 14), (6, 2), normalised=False),
    "llamagen of one level": llamagen_case(32, [2], [1], 3, 23, 2, 5, (5, 7), (3, 3), beta=0.5),
    "llamagen of published widths": llamagen_case(128, [1], [1], 2, 37, 8, 6, (6, 6), (4, 8), bare=True),
    "taming as f16": taming_case(32, [1, 1, 2, 2, 4], 2, 64, [4], 67, 40, 40, (64, 64), (32, 48)),
    "taming, attention at three levels": taming_case(32, [1, 2, 1, 3], 1, 32, [32, 8, 4], 41, 5, 7, (32, 32), (24, 16)),
    "taming, attention at none": taming_case(64, [1, 1], 2, 18, [], 29, 6, 3, (18, 18), (10, 22)),
    "taming, attention that no level reaches": taming_case(32, [1, 2], 1, 20, [16], 29, 4, 4, (20, 20), (8, 12)),
    "maskgit of four levels": maskgit_case(32, [1, 2, 2, 3], 2, 31, 9, (32, 32), (16, 24)),
    "maskgit of two levels": maskgit_case(64, [2, 1], 1, 17, 24, (12, 20), (6, 4)),
    "titok as S-128": titok_case(
        (32, 2, 4, 4.0), (32, 2, 4, 4.0), 4, 26, 53, 12, (16, 16), proxy=(32, [1, 2, 1], 2, 19, 6)
    ),
    "titok as L-32": titok_case(
        (72, 3, 6, 4.0), (40, 4, 5, 4.0), 8, 3, 83, 5, (32, 32), proxy=(32, [1, 1, 2, 2], 1, 43, 11)
    ),
    "titok, codes as they are": titok_case(
        (24, 1, 2, 3.0), (18, 2, 1, 2.0), 2, 7, 13, 4, (6, 6), normalised=False, proxy=(64, [1, 2], 1, 7, 5)
    ),
    "titok of one stage as BL-64": titok_case(
        (30, 2, 3, 4.0), (56, 4, 7, 4.0), 4, 11, 59, 9, (20, 20), normalised=False
    ),
    "titok of one stage, not square": titok_case((16, 1, 2, 2.5), (24, 3, 4, 4.0), 3, 29, 47, 6, (9, 15)),
    "vit-vqgan as Small": vit_case((64, 3, 4, 256, 16), (64, 3, 4, 256, 16), 8, (40, 40), 73, 32),
    "vit-vqgan, other decoder": vit_case((20, 1, 2, 13, 7), (36, 4, 3, 30, 12), 4, (16, 16), 19, 6, beta=0.5),
    "vit-vqgan, one full head, not square": vit_case(
        (12, 2, 1, 24, 12), (8, 2, 1, 16, 8), 3, (9, 15), 31, 4, normalised=False
    ),
    "deepul, wide": deepul_case(48, 20, 3, 113, 6),
    "deepul, narrow": deepul_case(6, 2, 1, 7, 17),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The reference folder of each case."""
    made = {}
    for number, (name, case) in enumerate(CASES.items()):
        folder = made[name] = tmp_path_factory.mktemp("reference")
        generator = torch.Generator().manual_seed(number)
        layout = KINDS[case.kind]
        module = layout.build(layout.read_config(case.config)).eval()
        for key, tensor in module.state_dict().items():
            if not key.endswith(".positions"):
                scale = tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.1
                drawn = scale * torch.randn(tensor.shape, generator=generator)
                tensor.copy_(drawn + (1.0 if "norm" in key and key.endswith("weight") else 0.0))
        state = export_foreign(layout, module)
        with torch.inference_mode():
            arrays = case.arrays(state, generator)
        if number % 2:
            save_file(state, folder / "model.safetensors")
        else:
            torch.save({layout.container: state} if layout.container else state, folder / "weights.pt")
        (folder / "config.json").write_text(json.dumps(case.config))
        np.savez(folder / "io.npz", **{name: array.numpy() for name, array in arrays.items()})
    return made


def weights_in(folder: Path) -> Path:
    return next(file for file in folder.iterdir() if file.suffix in (".pt", ".safetensors"))


@pytest.mark.parametrize("name", CASES)
def test_a_reference_folder_of_any_size_is_reproduced(folders, tmp_path, capsys, name):
    kind, folder = CASES[name].kind, folders[name]
    command = ["import", kind, str(weights_in(folder)), "--verify", str(folder), "--quiet"]
    assert run([*command, "-o", str(tmp_path / "good")]) == 0
    printed = capsys.readouterr().out
    with np.load(folder / "io.npz") as arrays:
        outputs = set(arrays) - {"image", "image_nonsquare", "random_indices"}
    assert {line.split()[0] for line in printed.splitlines() if line.rstrip().endswith("holds")} == outputs

    layout, imported = KINDS[kind], load_image_tokenizer(tmp_path / "good")
    again, _ = import_foreign(layout, export_foreign(layout, imported), layout.write_config(imported))
    assert again.config == imported.config
    assert all(torch.equal(again.state_dict()[key], tensor) for key, tensor in imported.state_dict().items())


@pytest.mark.parametrize("name", CASES)
def test_every_perturbed_array_is_seen(folders, tmp_path, capsys, name):
    kind, folder = CASES[name].kind, folders[name]
    with np.load(folder / "io.npz") as file:
        arrays = {key: file[key].copy() for key in file}
    outputs = set(arrays) - {"image", "image_nonsquare", "random_indices"}
    for key in outputs:
        arrays[key].reshape(-1)[-1] += 3e-4 if arrays[key].dtype.kind == "f" else 1  # that code may not exist
    spoilt = tmp_path / "spoilt"
    shutil.copytree(folder, spoilt)
    np.savez(spoilt / "io.npz", **arrays)
    command = ["import", kind, str(weights_in(spoilt)), "--verify", str(spoilt), "--quiet", "-o", str(tmp_path / "bad")]
    assert run(command) == 1
    printed = capsys.readouterr().out
    assert {line.split()[0] for line in printed.splitlines() if line.rstrip().endswith("FAILS")} == outputs
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", "config.json is not a file; give a JSON"),
        ("weights.pt", "holds 0 weight files; a reference folder has exactly one of"),
        ("io.npz", "io.npz; fetch or make the reference folder again"),
        ("everything", "holds 0 weight files; a reference folder has exactly one of"),
    ],
)
def test_an_incomplete_reference_folder_is_refused(folders, tmp_path, capsys, missing, message):
    folder, partial = folders["deepul, narrow"], tmp_path / "partial"
    shutil.copytree(folder, partial, ignore=shutil.ignore_patterns("*" if missing == "everything" else missing))
    command = ["import", "deepul", str(weights_in(folder)), "--verify", str(partial), "-o", str(tmp_path / "out")]
    assert run(command) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_weights_that_differ_from_the_folders_are_seen(folders, tmp_path, capsys):
    """A reference folder of the same sizes judges the file that is imported, not its own."""
    folder = folders["deepul, narrow"]
    state = torch.load(weights_in(folder), weights_only=True)
    state["pre_quantization_conv.bias"] += 0.01
    torch.save(state, tmp_path / "other.pt")
    command = ["import", "deepul", str(tmp_path / "other.pt"), "--verify", str(folder), "-o", str(tmp_path / "out")]
    assert run(command) == 1
    assert "the reference was not reproduced; nothing was written" in capsys.readouterr().err
