"""`smalti import` and `smalti export`, through the command line."""

import json
import shutil

import pytest
import torch

from smalti.cli.app import run
from smalti.errors import InputError
from smalti.image_tokenizers import load_image_tokenizer, save_image_tokenizer
from smalti.image_tokenizers.quantizer import FSQConfig, QuantizerConfig
from smalti.image_tokenizers.titok import TiTok, TiTokConfig, ViTConfig
from smalti.image_tokenizers.vit_vqgan import ViTVQGAN
from smalti.image_tokenizers.vqgan import VQGAN, VQGANConfig
from smalti.interop import deepul, vit_vqgan
from smalti.interop.commands import KINDS, export_weights, import_weights, verify
from smalti.interop.keys import export_foreign

VIT_CONFIG = {
    "image_size": 8,
    "patch_size": 4,
    "encoder": {"dim": 12, "depth": 1, "heads": 3, "mlp_dim": 7, "dim_head": 5},
    "decoder": {"dim": 20, "depth": 1, "heads": 2, "mlp_dim": 11, "dim_head": 3},
    "quantizer": {"embed_dim": 5, "n_embed": 31},
}
TINY_VQGAN = VQGANConfig(
    quantizer=FSQConfig(levels=(5, 3)),
    image_size=(4, 6),
    channels=32,
    encoder_multipliers=(1, 1),
    decoder_multipliers=(1, 1),
    encoder_attention_levels=(),
    decoder_attention_levels=(1,),
    num_res_blocks=1,
    latent_channels=5,
)
TINY_TITOK = TiTokConfig(
    encoder=ViTConfig(width=10, num_layers=1, num_heads=2, patch_size=2),
    decoder=ViTConfig(width=9, num_layers=1, num_heads=3, patch_size=2),
    num_latents=7,
    quantizer=QuantizerConfig(codebook_size=31, code_dim=5),
    image_size=(4, 6),
    proxy=VQGANConfig(
        quantizer=QuantizerConfig(codebook_size=13, code_dim=5, update="gradient"),
        image_size=(4, 6),
        channels=32,
        encoder_multipliers=(1, 1),
        decoder_multipliers=(1, 1),
        encoder_attention_levels=(),
        decoder_attention_levels=(),
        num_res_blocks=1,
        latent_channels=5,
        form="maskgit",
    ),
)
DEEPUL_CONFIG = {"h_dim": 14, "res_h_dim": 5, "n_res_layers": 3, "n_embeddings": 31, "embedding_dim": 7}


@pytest.fixture
def vit_files(tmp_path):
    """A small foreign checkpoint and, under another name, its config."""
    torch.manual_seed(0)
    module = vit_vqgan.LAYOUT.build(vit_vqgan.read_config(VIT_CONFIG))
    torch.save({"state_dict": export_foreign(vit_vqgan.LAYOUT, module)}, tmp_path / "vit.ckpt")
    (tmp_path / "vit.json").write_text(json.dumps(VIT_CONFIG))
    return tmp_path / "vit.ckpt", tmp_path / "vit.json", module


def test_import_then_export_then_import(tmp_path, vit_files, capsys):
    file, config, module = vit_files
    bundle = tmp_path / "bundle"
    assert run(["import", "vit-vqgan", str(file), "-o", str(bundle), "--config", str(config)]) == 0
    printed = capsys.readouterr().out
    assert "pre_quant.weight -> to_code.weight [5, 12]" in printed
    assert "weights taken from `state_dict`" in printed
    loaded = load_image_tokenizer(bundle)
    assert loaded.config == module.config

    exported = tmp_path / "again.safetensors"
    assert run(["export", "vit-vqgan", str(bundle), str(exported)]) == 0
    # The config written beside the weights is found without being named.
    assert run(["import", "vit-vqgan", str(exported), "-o", str(tmp_path / "second"), "--quiet"]) == 0
    assert "again.config.json was read" in capsys.readouterr().out
    second = load_image_tokenizer(tmp_path / "second").state_dict()
    assert all(torch.equal(second[name], tensor) for name, tensor in module.state_dict().items())


def test_nothing_is_overwritten_without_force(tmp_path, vit_files, capsys):
    file, config, _ = vit_files
    command = ["import", "vit-vqgan", str(file), "-o", str(tmp_path / "bundle"), "--config", str(config)]
    assert run(command) == 0
    assert run(command) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert run([*command, "--force"]) == 0
    export = ["export", "vit-vqgan", str(tmp_path / "bundle"), str(file)]
    assert run(export) == 2


def test_force_replaces_nothing_but_an_image_tokenizer(tmp_path, vit_files, capsys):
    file, config, _ = vit_files
    precious = tmp_path / "home" / "thesis.txt"
    precious.parent.mkdir()
    precious.write_text("years of work")
    command = ["import", "vit-vqgan", str(file), "-o", str(precious.parent), "--config", str(config), "--force"]
    assert run(command) == 2
    assert "so --force does not replace it" in capsys.readouterr().err
    assert precious.exists()


@pytest.mark.parametrize("changed", ["folder", "weights"])
def test_verify_fails_with_status_1_and_writes_nothing(shared_dir, tmp_path, capsys, changed):
    reference = tmp_path / "reference"
    shutil.copytree(shared_dir / "golden" / "vitvqgan", reference)
    command = ["import", "vit-vqgan", str(reference / "weights.pt"), "--verify", str(reference)]
    assert run([*command, "-o", str(tmp_path / "good"), "--quiet"]) == 0
    assert "holds" in capsys.readouterr().out
    assert load_image_tokenizer(tmp_path / "good").config.codebook_size == 64

    content = torch.load(reference / "weights.pt", weights_only=True)
    content["state_dict"]["post_quant.weight"][0, 0] += 0.05
    perturbed = reference / "weights.pt" if changed == "folder" else tmp_path / "perturbed.pt"
    torch.save(content, perturbed)
    command[2] = str(perturbed)
    config = ["--config", str(reference / "config.json")]
    assert run([*command, *config, "-o", str(tmp_path / "bad"), "--quiet"]) == 1
    captured = capsys.readouterr()
    assert "FAILS" in captured.out
    assert "not reproduced" in captured.err
    assert not (tmp_path / "bad").exists()


def test_a_reference_of_other_sizes_is_run_with_its_own_weights(shared_dir, tmp_path, vit_files):
    file, config, _ = vit_files
    imported = import_weights("vit-vqgan", file, tmp_path / "bundle", config, shared_dir / "golden" / "vitvqgan")
    assert imported.holds
    assert "its own weights were run" in imported.notes[-1]


@pytest.mark.parametrize(("kind", "name"), [("titok", "titok"), ("titok", "titok_rgb"), ("deepul", "deepul_vqvae")])
def test_verify_by_kind(shared_dir, kind, name):
    errors = verify(kind, shared_dir / "golden" / name)
    assert errors
    assert all(error.holds for error in errors)


def test_a_malicious_file_is_one_line_on_stderr(tmp_path, capsys):
    class Malicious:
        def __reduce__(self):
            return print, ("it ran",)

    torch.save({"model": Malicious()}, tmp_path / "weights.pt")
    assert run(["import", "taming", str(tmp_path / "weights.pt"), "-o", str(tmp_path / "bundle")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "is refused and nothing in it was run" in captured.err


def test_deepul_needs_no_config(tmp_path):
    torch.manual_seed(0)
    module = deepul.LAYOUT.build(deepul.read_config(DEEPUL_CONFIG))
    torch.save(export_foreign(deepul.LAYOUT, module), tmp_path / "vqvae.pth")
    imported = import_weights("deepul", tmp_path / "vqvae.pth", tmp_path / "bundle")
    assert imported.report.sizes == "from the shapes of the weights"
    assert torch.equal(load_image_tokenizer(tmp_path / "bundle").quantizer.codebook, module.quantizer.codebook)


def test_a_tokenizer_of_another_family_is_not_exported(tmp_path, vit_files):
    file, config, _ = vit_files
    import_weights("vit-vqgan", file, tmp_path / "bundle", config)
    with pytest.raises(InputError, match="holds a ViTVQGAN, which the taming layout is not for"):
        export_weights("taming", tmp_path / "bundle", tmp_path / "out.pt")


def test_unknown_kinds_list_the_known_ones(tmp_path):
    with pytest.raises(InputError, match=f"no kind 'vqgan'; known are {', '.join(KINDS)}"):
        verify("vqgan", tmp_path)


@pytest.mark.parametrize(
    ("build", "config"),
    [(VQGAN, TINY_VQGAN), (TiTok, TINY_TITOK), (ViTVQGAN, vit_vqgan.read_config(VIT_CONFIG))],
)
def test_every_family_comes_back_from_its_folder(tmp_path, build, config):
    module = build(config).eval()
    save_image_tokenizer(module, tmp_path / "saved")
    loaded = load_image_tokenizer(tmp_path / "saved")
    assert loaded.config == config
    codes = torch.randint(config.codebook_size, (2, *config.grid))
    assert torch.equal(loaded.decode_codes(codes), module.decode_codes(codes))
