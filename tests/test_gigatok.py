"""GigaTok's transformers: parity with the network written plainly, the way back, what they draw, bad files."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from original_networks import run_gigatok

from smalti.bundle import Bundle
from smalti.cli.app import run
from smalti.errors import InputError
from smalti.image_tokenizers import save_image_tokenizer
from smalti.image_tokenizers.quantizer import QuantizerConfig
from smalti.image_tokenizers.titok import TiTok, TiTokConfig, ViTConfig
from smalti.interop import gigatok_gpt, llamagen_gpt
from smalti.interop.commands import verify
from smalti.interop.token_models import GIGATOK
from smalti.tasks.classes import ClassPipeline
from smalti.weight_files import ForeignWeights

NUM_HEADS, NUM_CODES, NUM_CLASSES = 3, 7, 5
CONFIG = {
    "class": gigatok_gpt.CLASS_NAME,
    "ModelArgs": {
        "dim": 12,
        "n_layer": 2,
        "n_head": NUM_HEADS,
        "multiple_of": 8,
        "vocab_size": 31,
        "block_size": NUM_CODES,
        "num_classes": NUM_CLASSES,
        "rope": False,
        "use_qk_norm": False,
        "resid_dropout_p": 0.1,
    },
    "generate": {"cfg_scale": 3.0},
}


def gigatok_shapes(
    width: int = 12, d_ff: int = 32, num_layers: int = 2, num_codes: int = NUM_CODES, num_classes: int = NUM_CLASSES
) -> dict[str, tuple[int, ...]]:
    """The original's keys, spelt out here."""
    shapes = {
        "cls_embedding.embedding_table.weight": (num_classes + 1, width),
        "tok_embeddings.weight": (31, width),
        "positional_embedding": (1 + num_codes, width),
        "norm.weight": (width,),
        "output.weight": (31, width),
    }
    for i in range(num_layers):
        shapes |= {
            f"layers.{i}.attention.wqkv.weight": (3 * width, width),
            f"layers.{i}.attention.wo.weight": (width, width),
            f"layers.{i}.attention_norm.weight": (width,),
            f"layers.{i}.ffn_norm.weight": (width,),
            f"layers.{i}.feed_forward.w1.weight": (d_ff, width),
            f"layers.{i}.feed_forward.w3.weight": (d_ff, width),
            f"layers.{i}.feed_forward.w2.weight": (width, d_ff),
        }
    return shapes


def gigatok_state() -> dict[str, torch.Tensor]:
    """Random weights."""
    random = torch.Generator().manual_seed(0)
    return {
        key: torch.randn(shape, generator=random) * (0.4 if len(shape) == 2 else 0.1) + (len(shape) == 1)
        for key, shape in gigatok_shapes().items()
    }


def published_state(num_codes: int) -> dict[str, torch.Tensor]:
    """In the shapes of the B model, without its memory."""
    shapes = gigatok_shapes(768, 2048, 12, num_codes, 1000)
    return {key: torch.empty(1).expand(shape) for key, shape in shapes.items()}


def greedy(state, labels, nulls, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and the logits they were drawn from, each by a pass over all before it."""
    codes = torch.zeros(len(labels), 0, dtype=torch.long)
    for _ in range(NUM_CODES):
        padded = torch.cat((codes, codes.new_zeros(len(labels), 1)), 1)
        cond, null = (run_gigatok(state, NUM_HEADS, given, padded) for given in (labels, nulls))
        logits = null + scale * (cond - null)
        best, second = logits[:, -1].topk(2).values.unbind(-1)
        assert (best - second).min() > 1e-3, "a near tie: take another seed"
        codes = torch.cat((codes, logits[:, -1:].argmax(-1)), 1)
    return codes, logits


@pytest.fixture
def folder(tmp_path):
    """A reference folder of the network written plainly."""
    state, labels, nulls = gigatok_state(), torch.tensor([1, 4]), torch.tensor([NUM_CLASSES] * 2)
    tokens = torch.randint(31, (2, NUM_CODES), generator=torch.Generator().manual_seed(1))
    arrays = {"tokens": tokens, "class_ids": labels, "null_class_ids": nulls}
    arrays["logits"] = run_gigatok(state, NUM_HEADS, labels, tokens)
    arrays["logits_uncond"] = run_gigatok(state, NUM_HEADS, nulls, tokens)
    arrays["loss"] = torch.nn.functional.cross_entropy(arrays["logits"].flatten(0, 1), tokens.flatten())
    for name, scale in (("nocfg", 1.0), ("cfg", 3.0)):
        arrays[f"gen_{name}_ids"], arrays[f"gen_{name}_logits"] = greedy(state, labels, nulls, scale)
    reference = tmp_path / "reference"
    reference.mkdir()
    torch.save({"model": state, "optimizer": {}, "steps": 3}, reference / "weights.pt")
    (reference / "config.json").write_text(json.dumps(CONFIG))
    np.savez(reference / "io.npz", **{name: array.numpy() for name, array in arrays.items()})
    return reference


def test_every_array_is_that_of_the_network_written_plainly(tmp_path, folder, capsys):
    errors = verify("gigatok", folder)
    assert {error.name for error in errors} >= {"logits", "logits_uncond", "gen_nocfg_ids", "gen_cfg_ids", "loss"}
    assert [error for error in errors if not error.holds] == []
    command = ["import", "gigatok", str(folder / "weights.pt"), "--verify", str(folder)]
    assert run([*command, "-o", str(tmp_path / "good")]) == 0
    printed = capsys.readouterr().out
    assert "positional_embedding -> transformer.positions.weight [8, 12]" in printed and "FAILS" not in printed
    content = torch.load(folder / "weights.pt", weights_only=True)
    content["model"]["positional_embedding"][3] += 0.5
    torch.save(content, tmp_path / "changed.pt")
    command[2:3] = [str(tmp_path / "changed.pt"), "--config", str(folder / "config.json")]
    assert run([*command, "-o", str(tmp_path / "bad")]) == 1 and not (tmp_path / "bad").exists()


def test_imports_of_exports_are_bit_equal(tmp_path, folder):
    state = torch.load(folder / "weights.pt", weights_only=True)["model"]
    source = folder / "weights.pt"
    for name, suffix in (("first", ".pt"), ("second", ".safetensors")):
        assert run(["import", "gigatok", str(source), "-o", str(tmp_path / name), "--quiet"]) == 0
        source = tmp_path / f"again{suffix}"
        assert run(["export", "gigatok", str(tmp_path / name), str(source), "--force"]) == 0
    first, second = (Bundle.load(tmp_path / name) for name in ("first", "second"))
    assert first.weights_sha256 == second.weights_sha256 and first.model.config == second.model.config
    exported = torch.load(tmp_path / "again.pt", weights_only=True)["model"]
    assert set(exported) == set(state) and all(torch.equal(exported[key], state[key]) for key in state)


def test_codes_are_drawn_and_scored_without_an_image_tokenizer(tmp_path, folder, capsys):
    bundle = tmp_path / "out"
    assert run(["import", "gigatok", str(folder / "weights.pt"), "-o", str(bundle), "--quiet"]) == 0
    pipe = ClassPipeline.load(bundle)
    assert pipe.sampling.picture.guidance_scale == 4.0 and pipe.sampling.picture.top_k == 0
    codes = pipe.generate_codes([1, 4], temperature=0.0, guidance_scale=3.0)
    arrays = np.load(folder / "io.npz")
    assert codes.shape == (2, 1, NUM_CODES) and codes.flatten(1).tolist() == arrays["gen_cfg_ids"].tolist()
    tokens = torch.from_numpy(arrays["tokens"])
    nats = pipe.score_codes(tokens[:, None], [1, 4])
    assert float(nats.mean()) / NUM_CODES == pytest.approx(float(arrays["loss"]), abs=1e-5)
    command = ["generate", "--class", "1", "-o", str(tmp_path / "x.png"), "--bundle", str(bundle)]
    capsys.readouterr()
    assert run(command) == 2
    printed = capsys.readouterr().err
    assert "has no image tokenizer to make pictures of them" in printed and printed.count("\n") == 1
    assert run(["doctor", str(bundle)]) == 0
    assert "generate_codes" in (bundle / "README.md").read_text()


def test_an_image_tokenizer_of_ours_makes_pictures_of_its_codes(tmp_path, folder, capsys):
    torch.manual_seed(0)
    sides = {"encoder": ViTConfig(width=10, num_layers=1, num_heads=2, patch_size=2)}
    codes = QuantizerConfig(codebook_size=31, code_dim=5, update="gradient")
    config = TiTokConfig(
        **sides,
        decoder=sides["encoder"],
        num_latents=NUM_CODES,
        quantizer=codes,
        image_size=(4, 6),
        target="pixels",
        mixed_latents=False,
        proxy=None,
    )
    save_image_tokenizer(TiTok(config), tmp_path / "titok")
    command = ["import", "gigatok", str(folder / "weights.pt"), "-o", str(tmp_path / "out"), "--image-tokenizer"]
    assert run([*command, str(tmp_path / "titok"), "--quiet"]) == 0
    [picture] = ClassPipeline.load(tmp_path / "out").generate(2)
    assert picture.size == (6, 4)
    assert run([*command, str(folder / "weights.pt"), "--force"]) == 2
    assert "the image tokenizer that gigatok's weights go with is not read" in capsys.readouterr().err


def test_published_sizes_are_known_by_their_shapes():
    config, name = gigatok_gpt.infer_config(published_state(256))
    assert name == "llamagen-b" and (config["block_size"], config["num_classes"]) == (256, 1000)
    ours, layout = gigatok_gpt.read_config(config)
    assert (ours.transformer.num_heads, ours.transformer.max_length, layout.max_length) == (12, 257, 257)
    with pytest.raises(InputError, match=r"no published GigaTok \(2 layers, width 12, feed-forward 32\)"):
        gigatok_gpt.infer_config(gigatok_state())


def test_what_makes_it_another_network_is_named(tmp_path, folder, capsys):
    weights = ForeignWeights(tensors=gigatok_state(), notes=())
    with pytest.raises(InputError, match="GigaTok's weights tell how many codes a picture has"):
        GIGATOK.read(weights, CONFIG, 256)
    for key, option in (
        ("layers.0.attention.q_norm.weight", "--qk-norm"),
        ("layers.1.adaLN_modulation.1.weight", "--adaLN"),
        ("layers.0.ada_gss", "--simple-adaLN"),
    ):
        more = replace(weights, tensors={**weights.tensors, key: torch.ones(4)})
        with pytest.raises(InputError, match=f"this GigaTok was trained with {option}, which is not read"):
            GIGATOK.read(more, CONFIG)
    for field, value, message in (
        ("rope", True, "rope is True; only False"),
        ("cls_token_num", 2, "cls_token_num is 2; only 1"),
        ("rope_base", 10000, "rope_base is not a field known here"),
        ("dim", 13, "d_model 13 is not divisible by num_heads 3"),
    ):
        with pytest.raises(InputError, match=message):
            gigatok_gpt.read_config({**CONFIG, "ModelArgs": {**CONFIG["ModelArgs"], field: value}})
    large = published_state(4)
    del large["positional_embedding"]
    with pytest.raises(InputError, match=r"may be LlamaGen's .*, or trained with --rope"):
        gigatok_gpt.infer_config(large)
    command = ["import", "llamagen", str(folder / "weights.pt"), "-o", str(tmp_path / "out")]
    assert run(command) == 2 and "import them as gigatok" in capsys.readouterr().err
    bundle = GIGATOK.read(weights, CONFIG)
    with pytest.raises(InputError, match="this model is none that LlamaGen has"):
        llamagen_gpt.write_config(bundle.model.config, bundle.layout, NUM_CLASSES)


class Malicious:
    def __reduce__(self):
        return print, ("it ran",)


def test_files_that_do_not_fit_are_refused_and_nothing_is_written(tmp_path, folder, capsys):
    state, key = gigatok_state(), "positional_embedding"
    (tmp_path / "short.pt").write_bytes((folder / "weights.pt").read_bytes()[:-2000])
    torch.save({"model": {**state, key: torch.full_like(state[key], torch.nan)}}, tmp_path / "nan.pt")
    torch.save({"model": {k: tensor for k, tensor in state.items() if k != key}}, tmp_path / "missing.pt")
    torch.save({"model": {**state, key: state[key][:-1]}}, tmp_path / "fewer.pt")
    torch.save({"model": {**state, "more.weight": torch.zeros(2)}}, tmp_path / "more.pt")
    torch.save({"model": state, "args": Malicious()}, tmp_path / "evil.pt")
    for name, message in (
        ("short.pt", "cut short"),
        ("nan.pt", "positional_embedding holds 96 of 96 values that are NaN"),
        ("missing.pt", "missing: positional_embedding [8, 12]"),
        ("fewer.pt", "shape: positional_embedding is [7, 12], expected [8, 12]"),
        ("more.pt", "unexpected: more.weight"),
        ("evil.pt", "nothing in it was run"),
    ):
        command = ["import", "gigatok", str(tmp_path / name), "-o", str(tmp_path / "out")]
        assert run([*command, "--config", str(folder / "config.json")]) == 2, name
        printed = capsys.readouterr()
        assert message in printed.err and printed.err.count("\n") == 1 and printed.out == ""
        assert not (tmp_path / "out").exists()
