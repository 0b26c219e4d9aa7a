"""Class-conditional models of other projects: imported, drawn from, replayed, exported, and refused."""

import json
import re
import shutil
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from smalti.bundle import Bundle, Classes
from smalti.cli.app import run
from smalti.errors import InputError
from smalti.image_files import read_receipt
from smalti.image_tokenizers import save_image_tokenizer
from smalti.image_tokenizers.quantizer import QuantizerConfig
from smalti.image_tokenizers.vqgan import VQGAN, VQGANConfig
from smalti.interop import llamagen_gpt, rar
from smalti.interop.commands import verify
from smalti.interop.token_models import LLAMAGEN, RAR_KIND
from smalti.models.config import PRESETS, preset_config
from smalti.models.decoder_only import new_model
from smalti.models.rar import PRESETS as RAR_PRESETS
from smalti.models.rar import RAR
from smalti.sequences.layout import Layout
from smalti.sequences.vocabulary import FEATURES, Vocabulary
from smalti.tasks.classes import ClassPipeline
from smalti.weight_files import ForeignWeights

SETS = {"llamagen": "llamagen_gpt_c2i", "rar": "rar"}
CODES = {"llamagen": 61, "rar": 60}


@pytest.fixture
def weights(shared_dir):
    """The weight file of a reference set."""
    return lambda kind: next((shared_dir / "golden" / SETS.get(kind, kind)).glob("weights.*"))


@pytest.fixture
def tokenizer(tmp_path):
    """The folder of an image tokenizer for 16 codes, of random weights."""

    def make(codebook_size: int):
        torch.manual_seed(0)
        config = VQGANConfig(
            quantizer=QuantizerConfig(codebook_size=codebook_size, code_dim=3, update="gradient"),
            image_size=(16, 16),
            channels=32,
            encoder_multipliers=(1, 1),
            decoder_multipliers=(1, 1),
            encoder_attention_levels=(),
            decoder_attention_levels=(),
            num_res_blocks=1,
            latent_channels=3,
        )
        save_image_tokenizer(VQGAN(config), tmp_path / "tokenizer")
        return tmp_path / "tokenizer"

    return make


@pytest.fixture
def imported(tmp_path, weights, tokenizer):
    """The bundle of a reference set, with ten named classes and an image tokenizer for pictures of 8 × 8."""

    def make(kind: str):
        names = tmp_path / "names.txt"
        names.write_text("\n".join(["tench", "goldfish, Carassius auratus", *map(str, range(20, 28))]))
        bundle = tmp_path / kind
        command = ["import", kind, weights(kind), "-o", bundle, "--quiet", "--class-names", names]
        assert run([*map(str, command), "--image-tokenizer", str(tokenizer(CODES[kind]))]) == 0
        return bundle

    return make


@pytest.mark.parametrize("kind", SETS)
def test_an_imported_model_draws_classes_and_its_pictures_are_drawn_again(tmp_path, imported, kind, capsys):
    bundle, picture = imported(kind), tmp_path / "fish.png"
    command = ["generate", "--class", "goldfish, Carassius auratus", "-o", str(picture), "--bundle", str(bundle)]
    assert run([*command, "--seed", "3", "--guidance-scale", "3", "--guidance-interval", "2:9"]) == 0
    receipt = read_receipt(picture)
    assert (receipt["label"], receipt["sampling"]["guidance_interval"]) == (1, [2, 9])
    with Image.open(picture) as image:
        assert image.size == (8, 8)
    assert run(["replay", str(picture), "--bundle", str(bundle)]) == 0
    pipe = ClassPipeline.load(bundle)
    how = {"guidance_scale": 3.0, "guidance_interval": (2, 9)}
    alone = pipe.generate_codes(1, seed=3, **how)
    assert alone[0].flatten().tolist() == receipt["codes"]
    together = pipe.generate_codes([5, "1", "tench"], seed=[0, 3, 1], **how)
    assert torch.equal(together[1], alone[0])
    guided, plain = pipe.generate_codes(4, n=8, guidance_scale=30.0, top_k=0), pipe.generate_codes(4, n=8)
    assert not torch.equal(guided, plain)
    *_, last = pipe.stream(1, seed=3, **how)
    assert last.codes.tolist() == receipt["codes"]
    assert run(["info", str(bundle)]) == 0
    assert "10: tench, goldfish, Carassius auratus" in capsys.readouterr().out
    assert "of 10 classes" in Bundle.load(bundle).card().replace("\n", " ")


@pytest.mark.parametrize("kind", SETS)
def test_the_score_of_what_was_drawn_is_its_log_probability(imported, kind):
    pipe = ClassPipeline.load(imported(kind))
    codes = pipe.generate_codes([2, 7], temperature=1.0, top_k=0, guidance_scale=1.0)
    nats = pipe.score_codes(codes, [2, 7])
    assert nats.shape == (2,) and bool((nats > 0).all())
    assert not torch.allclose(nats, pipe.score_codes(codes, [None, None]), atol=1e-3)


@pytest.mark.parametrize("kind", SETS)
def test_imports_of_exports_are_bit_equal(tmp_path, weights, kind):
    state, config = torch.load(weights(kind), weights_only=True), tmp_path / "again.config.json"
    for name, suffix in (("first", ".pt"), ("second", ".safetensors")):
        source = weights(kind) if name == "first" else tmp_path / "again.pt"
        assert run(["import", kind, str(source), "-o", str(tmp_path / name), "--quiet"]) == 0
        assert run(["export", kind, str(tmp_path / name), str(tmp_path / f"again{suffix}"), "--force"]) == 0
    first, second = (Bundle.load(tmp_path / name) for name in ("first", "second"))
    assert first.weights_sha256 == second.weights_sha256 and first.model.config == second.model.config
    exported = torch.load(tmp_path / "again.pt", weights_only=True)
    if kind == "llamagen":
        state, exported = state["model"], exported["model"]
    assert {key: tensor.shape for key, tensor in exported.items()} == {key: t.shape for key, t in state.items()}
    exact = [key for key in state if torch.equal(exported[key], state[key])]
    unread = {"rar": {"embeddings.weight", "pos_embed", "target_aware_pos_embed", "timesteps_embeddings"}}
    assert set(state) - set(exact) <= unread.get(kind, set())  # rows that no picture reaches
    assert json.loads(config.read_text())["class"].startswith(("autoregressive", "modeling"))


@pytest.mark.parametrize("name", ["llamagen_gpt_c2i", "llamagen_gpt_t2i", "rar"])
def test_verify_holds_for_the_folder_and_fails_for_other_weights(tmp_path, shared_dir, weights, name, capsys):
    kind, folder = name.partition("_")[0], shared_dir / "golden" / name
    errors = verify(kind, folder)
    assert all(error.holds for error in errors) and {error.name for error in errors} >= {"logits", "gen_cfg_ids"}
    state = torch.load(weights(name), weights_only=True)
    key = next(key for key in state.get("model", state) if key.endswith(("wqkv.weight", "qkv.weight")))
    state.get("model", state)[key][:, 0] += 0.5
    torch.save(state, tmp_path / "changed.pt")
    command = ["import", kind, str(tmp_path / "changed.pt"), "-o", str(tmp_path / "out"), "--quiet"]
    assert run([*command, "--config", str(folder / "config.json"), "--verify", str(folder)]) == 1
    assert "FAILS" in capsys.readouterr().out and not (tmp_path / "out").exists()


# ---- containers and sizes ----


def llamagen_state(name: str, num_layers: int | None = None) -> tuple[dict[str, torch.Tensor], int]:
    """A state dict of one number a tensor, expanded, of a published size; and its parameters."""
    layout = Layout.parse(Vocabulary({"image": 16384, "label": 1001}), {"label to image": "label{1} image{256}"})
    shape = preset_config(name, max_length=257, grid=(16, 16), prefix_length=1)
    with torch.device("meta"):
        model = new_model(layout, replace(shape, num_layers=num_layers or shape.num_layers))
    pieces = llamagen_gpt.piece_map(model.config)
    state = {piece.key: torch.zeros(1).expand(piece.shape) for made_of in pieces.values() for piece in made_of}
    return state, model.num_parameters


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llamagen-b", 110_888_448),
        ("llamagen-l", 342_910_976),
        ("llamagen-xl", 774_699_520),
        ("llamagen-xxl", 1_410_972_672),
        ("llamagen-xxxl", 3_893_027_840),
        ("llamagen-1b", 1_199_616_000),
        ("llamagen-3b", 3_096_659_200),
        ("llamagen-7b", 6_614_589_440),
    ],
)
def test_sizes_are_recognised_by_their_shapes_and_have_the_published_counts(name, expected):
    state, num_parameters = llamagen_state(name)
    assert num_parameters == expected
    config, found = llamagen_gpt.infer_config(state, 576)
    ours, layout = llamagen_gpt.read_config(config)
    assert found == name and ours.transformer.num_heads == PRESETS[name]["num_heads"]
    assert ours.transformer.grid == (24, 24) and str(layout["label to image"]) == "label{1} image{576}"
    assert sum(tensor.numel() for tensor in state.values()) == expected


@pytest.mark.parametrize("name", RAR_PRESETS)
def test_a_rar_is_told_by_its_shapes(name):
    with torch.device("meta"):
        pieces = rar.piece_map(RAR(replace(RAR_PRESETS[name], num_layers=2)).config)
    state = {piece.key: torch.zeros(1).expand(piece.shape) for made_of in pieces.values() for piece in made_of}
    assert rar.read_config(rar.infer_config(state)) == replace(RAR_PRESETS[name], num_layers=2)


@pytest.mark.parametrize("kind", SETS)
def test_a_model_of_another_shape_says_what_to_give(tmp_path, weights, kind, capsys):
    alone = tmp_path / "alone.bin"
    shutil.copy(weights(kind), alone)
    code = run(["import", kind, str(alone), "-o", str(tmp_path / "out"), "--quiet", *LLAMAGEN_SIZE[kind]])
    printed = capsys.readouterr()
    if kind == "rar":  # its shapes tell all
        assert code == 0 and "sizes: from the shapes of the weights" in printed.out
    else:
        assert code == 2 and "the shapes are of no published LlamaGen (3 layers, width 48" in printed.err


LLAMAGEN_SIZE = {"rar": [], "llamagen": ["--image-size", "256"]}


def test_the_size_of_pictures_is_taken_from_the_training_or_asked_for():
    state, _ = llamagen_state("llamagen-b", 12)
    config, _ = llamagen_gpt.infer_config(state, 4)
    weights = ForeignWeights(tensors={}, notes=())
    with pytest.raises(InputError, match="give --image-size 256, 384 or 512"):
        LLAMAGEN.read(replace(weights, tensors=state), None)
    with pytest.raises(InputError, match="--image-size is 250; expected a multiple of 16"):
        LLAMAGEN.read(replace(weights, tensors=state), None, 250)
    noted = replace(weights, tensors=state, settings={"image_size": 384, "downsample_size": 16})
    with pytest.raises(InputError, match="--image-size is 256, but the checkpoint was trained on pictures of 384"):
        LLAMAGEN.read(noted, None, 256)
    with pytest.raises(InputError, match="leave out --image-size"):
        LLAMAGEN.read(noted, config, 256)
    with pytest.raises(InputError, match="a RAR's weights tell how many"):
        RAR_KIND.read(noted, None, 256)


def test_every_container_gives_the_same_model(tmp_path, shared_dir, weights):
    state = torch.load(weights("llamagen"), weights_only=True)["model"]
    config = ["--config", str(shared_dir / "golden" / "llamagen_gpt_c2i" / "config.json")]
    args = Namespace(gpt_model="GPT-B", image_size=64, downsample_size=16)
    torch.save(
        {"model": {f"module.{key}": t for key, t in state.items()}, "optimizer": {}, "args": args}, tmp_path / "a.pt"
    )
    torch.save({"module": state}, tmp_path / "b.pt")
    torch.save({"state_dict": {f"_orig_mod.{key}": tensor for key, tensor in state.items()}}, tmp_path / "c.pt")
    torch.save(state, tmp_path / "consolidated.pth")
    caches = {"layers.0.attention.kv_cache.k_cache": torch.zeros(1), "freqs_cis": torch.zeros(2)}
    torch.save({"model": state | caches}, tmp_path / "d.pt")
    torch.save({"model": {k: torch.zeros_like(t) for k, t in state.items()}, "ema": state}, tmp_path / "e.pt")
    (tmp_path / "folder").mkdir()
    save_file(state, tmp_path / "folder" / "model.safetensors")
    hashes = set()
    for name in ("a.pt", "b.pt", "c.pt", "consolidated.pth", "d.pt", "e.pt", "folder"):
        command = ["import", "llamagen", str(tmp_path / name), "-o", str(tmp_path / "out"), "--quiet", "--force"]
        assert run([*command, *config]) == 0
        hashes.add(Bundle.load(tmp_path / "out").weights_sha256)
    assert len(hashes) == 1


# ---- bad input ----


def spoiled(kind: str, state: dict) -> dict:
    inner = state.get("model", state)
    key = list(inner)[2]
    if kind == "nan":
        inner[key].view(-1)[0] = torch.nan
    elif kind == "missing":
        del inner[key]
    elif kind == "extra":
        inner["more.weight"] = torch.zeros(3)
    elif kind == "quantized":
        inner[key] = inner[key].to(torch.int8)
    elif kind == "shape":
        inner[key] = inner[key].view(-1)[:-1]
    return state


@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("nan", "NaN or infinite"),
        ("missing", "missing: "),
        ("extra", "unexpected: more.weight"),
        ("quantized", "quantized weights are not read"),
        ("shape", "shape: "),
    ],
)
def test_weights_that_are_not_as_they_must_be(tmp_path, shared_dir, weights, kind, fault, message, capsys):
    torch.save(spoiled(fault, torch.load(weights(kind), weights_only=True)), tmp_path / "weights.pt")
    config = ["--config", str(shared_dir / "golden" / SETS[kind] / "config.json")]
    assert run(["import", kind, str(tmp_path / "weights.pt"), "-o", str(tmp_path / "out"), *config]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", SETS)
def test_files_that_are_none(tmp_path, weights, kind, capsys):
    class Malicious:
        def __reduce__(self):
            return print, ("it ran",)

    torch.save({"model": Malicious()}, tmp_path / "evil.pt")
    (tmp_path / "short.pt").write_bytes(weights(kind).read_bytes()[:-5000])
    (tmp_path / "none").mkdir()
    for name, message in (("evil.pt", "nothing in it was run"), ("short.pt", "cut short"), ("none", "0 weight files")):
        assert run(["import", kind, str(tmp_path / name), "-o", str(tmp_path / "out")]) == 2
        printed = capsys.readouterr()
        assert message in printed.err and printed.out == ""


def test_a_config_of_another_size_is_told_by_the_tensors(tmp_path, shared_dir, weights, capsys):
    content = json.loads((shared_dir / "golden" / "llamagen_gpt_c2i" / "config.json").read_text())
    content["ModelArgs"]["dim"] = 96
    (tmp_path / "config.json").write_text(json.dumps(content))
    command = ["import", "llamagen", str(weights("llamagen")), "-o", str(tmp_path / "out")]
    assert run([*command, "--config", str(tmp_path / "config.json")]) == 2
    assert "the weights do not fit the network" in capsys.readouterr().err
    content["ModelArgs"] |= {"dim": 49}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert run([*command, "--config", str(tmp_path / "config.json")]) == 2
    assert "d_model 49 is not divisible by num_heads 4" in capsys.readouterr().err


@pytest.mark.parametrize("kind", SETS)
def test_what_cannot_be_drawn(tmp_path, imported, kind, capsys):
    bundle = str(imported(kind))
    for given, message in (
        (["--class", "10"], "class 10 is out of range; expected 0 to 9"),
        (["--class", "-1"], "class -1 is out of range"),
        (["--class", "tensh"], "no class has that name; did you mean 'tench'?"),
        (["--class", "1", "--guidance-interval", "0:17", "--guidance-scale", "2"], "a picture has 16 codes"),
        (["--class", "1", "--guidance-interval", "16:"], "a picture has 16 codes"),
        (["--class", "1", "--guidance-interval", "3"], "expected START:END"),
        (["--class", "1", "--guidance-interval", "9:3"], "0 <= start <= end"),
        (["a caption"], "draws classes, not captions: give --class, a number from 0 to 9 or a name"),
        (["a caption", "--class", "1"], "a class is drawn by itself, without a caption"),
        (["--class", "1", "--best-of", "3"], "without --best-of"),
        ([], "what to draw?"),
    ):
        assert run(["generate", *given, "-o", str(tmp_path / "x.png"), "--bundle", bundle]) == 2
        assert message in capsys.readouterr().err
    assert run(["generate", "--class", "1", "-o", str(tmp_path / "x.png"), "--bundle", "digits"]) == 2
    assert "which knows no classes" in capsys.readouterr().err
    for command in (["caption", bundle], ["export", "hf", bundle, str(tmp_path / "llama")]):
        assert run([*command, *(["--bundle", bundle] if command[0] == "caption" else [])]) == 2
        capsys.readouterr()


def test_a_model_without_a_null_condition_is_not_guided(imported):
    pipe = ClassPipeline.load(imported("llamagen"))
    pipe.bundle.classes = Classes(num=11)
    pipe = ClassPipeline(pipe.bundle)
    assert pipe.generate_codes(10, guidance_scale=1.0).shape == (1, 4, 4)
    with pytest.raises(InputError, match="trained without a null condition"):
        pipe.generate_codes(1, guidance_scale=2.0)


def test_tokenizers_and_names_that_do_not_belong_to_the_model(tmp_path, weights, tokenizer, capsys):
    command = ["import", "rar", str(weights("rar")), "-o", str(tmp_path / "out"), "--quiet"]
    assert run([*command, "--image-tokenizer", str(tokenizer(61))]) == 2
    assert "a codebook of 61, the transformer draws codes of 60" in capsys.readouterr().err
    (tmp_path / "names.json").write_text('["a", "b"]')
    assert run([*command, "--class-names", str(tmp_path / "names.json")]) == 2
    assert "has 2 names; the model has 10 classes" in capsys.readouterr().err
    (tmp_path / "names.json").write_text(json.dumps(["a"] * 10))
    assert run([*command, "--class-names", str(tmp_path / "names.json")]) == 2
    assert "two classes are named 'a'" in capsys.readouterr().err
    assert run(["import", "taming", "x.pt", "-o", str(tmp_path / "out"), "--image-size", "256"]) == 2
    assert "--image-size goes with llamagen, rar" in capsys.readouterr().err
    assert run([*command]) == 0
    pipe, pictures = ClassPipeline.load(tmp_path / "out"), [torch.zeros(8, 8, 3, dtype=torch.uint8).numpy()]
    codes = pipe.generate_codes([1, 7], seed=3)
    assert codes.shape == (2, 1, 16) and bool((pipe.score_codes(codes, [1, 7]) > 0).all())
    for ask in (
        lambda: pipe.generate(1),
        lambda: list(pipe.stream(1)),
        lambda: pipe.decode(codes),
        lambda: pipe.decode_images(codes),
        lambda: pipe.encode(pictures),
    ):
        with pytest.raises(InputError, match="has no image tokenizer to make pictures of them"):
            ask()
    command = ["generate", "--class", "1", "-o", str(tmp_path / "x.png"), "--bundle", str(tmp_path / "out")]
    assert run(command) == 2 and "has no image tokenizer" in capsys.readouterr().err


def test_a_model_that_llamagen_cannot_be_says_why(tmp_path, imported):
    bundle = Bundle.load(imported("llamagen"))
    for changes, reason in (
        ({"zero_prefix_rotation": False}, "its zero_prefix_rotation is False, there it is True"),
        ({"bias": True}, "its bias is True"),
    ):
        config = replace(bundle.model.config, transformer=replace(bundle.model.config.transformer, **changes))
        with pytest.raises(InputError, match=re.escape(reason)):
            llamagen_gpt.write_config(config, bundle.layout, 10)
    for d_ff in (64, 96, 97, 130, 1000):  # whatever it is, it can be said
        config = replace(bundle.model.config, transformer=replace(bundle.model.config.transformer, d_ff=d_ff))
        written = llamagen_gpt.write_config(config, bundle.layout, 10)
        assert llamagen_gpt.read_config(written)[0].transformer.d_ff == d_ff


def test_a_model_of_captions_says_that_it_needs_features(tmp_path, weights, capsys):
    bundle = str(tmp_path / "t2i")
    assert run(["import", "llamagen", str(weights("llamagen_gpt_t2i")), "-o", bundle, "--quiet"]) == 0
    capsys.readouterr()
    assert run(["generate", "a dog", "-o", str(tmp_path / "x.png"), "--bundle", bundle]) == 2
    assert "a bundle of features of captions" in capsys.readouterr().err
    assert FEATURES in Bundle.load(bundle).layout.vocabulary
