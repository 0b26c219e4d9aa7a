"""Janus: parity with the classes of `transformers` in both key layouts, prompts, guidance, round trips, refusals."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from serving import Running, picture_of
from tiny_janus import (
    BEGIN,
    CODES,
    LENGTH,
    PAD,
    PROMPTS,
    SHAPES,
    SIDE,
    START,
    null_ids,
    original_config,
    original_state,
    prompt_ids,
    save_checkpoint,
    tokenizer,
    transformers_model,
)

from smalti.bundle import Bundle
from smalti.cli.app import run
from smalti.engine.executors import EXECUTORS
from smalti.errors import InputError
from smalti.image_files import read_receipt
from smalti.interop import janus
from smalti.interop.token_models import JANUS
from smalti.models.janus import PRESETS, Janus
from smalti.tasks.doctor import examine
from smalti.tasks.images import Pipeline
from smalti.weight_files import ForeignWeights, read_weights

LAYOUTS = ("original", "transformers")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The folder of a checkpoint, made once."""
    made: dict[tuple[str, str], Path] = {}

    def make(layout: str = "original", shape: str = "plain") -> Path:
        if (layout, shape) not in made:
            folder = tmp_path_factory.mktemp("janus") / f"{layout}-{shape}"
            made[layout, shape] = save_checkpoint(folder, layout, shape)
        return made[layout, shape]

    return make


@pytest.fixture(scope="module")
def imported(tmp_path_factory, checkpoints):
    """The bundle of a checkpoint, made once."""
    made: dict[tuple[str, str], Path] = {}

    def make(layout: str = "original", shape: str = "plain") -> Path:
        if (layout, shape) not in made:
            bundle = tmp_path_factory.mktemp("bundle") / "janus"
            assert run(["import", "janus", str(checkpoints(layout, shape)), "-o", str(bundle), "--quiet"]) == 0
            made[layout, shape] = bundle
        return made[layout, shape]

    return make


@torch.inference_mode()
def their_logits(model, ids: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """What each code is predicted by, from whole sequences."""
    words = model.get_input_embeddings()(ids)
    drawn = model.prepare_embeddings_for_image_generation(codes[:, :-1])
    hidden = model.model.language_model(inputs_embeds=torch.cat((words, drawn), dim=1)).last_hidden_state
    return model.model.generation_head(hidden[:, ids.shape[1] - 1 :])


@torch.inference_mode()
def greedy(model, ids: list[int], scale: float) -> list[int]:
    """The plain loop: both conditions, everything computed anew for every code."""
    found: list[int] = []
    for _ in range(LENGTH):
        codes = torch.tensor([[*found, 0]])
        cond, null = (their_logits(model, torch.tensor([row]), codes)[0, -1] for row in (ids, null_ids(ids)))
        found.append(int((null + scale * (cond - null)).argmax()))
    return found


def some_codes(rows: int) -> torch.Tensor:
    return torch.randint(CODES, (rows, LENGTH), generator=torch.Generator().manual_seed(5))


# ---- parity ----


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_pictures_are_those_of_transformers(imported, layout, shape):
    theirs, pipe = transformers_model(shape), Pipeline.load(imported(layout, shape))
    ids, codes = torch.tensor([prompt_ids(PROMPTS[0]), null_ids(prompt_ids(PROMPTS[0]))]), some_codes(2)
    expected = their_logits(theirs, ids, codes)
    vocabulary = pipe.layout.vocabulary
    ours = torch.cat(
        (
            ids[:, :-1],
            torch.full((2, 1), vocabulary.special(START)),
            vocabulary.ids("image", codes[:, :-1]),
        ),
        dim=1,
    )
    slot = pipe.layout.slots[pipe.layout.slot_index("text to image", 1)]
    with torch.inference_mode():
        found = pipe.model.logits(pipe.model.hidden(ours)[:, ids.shape[1] - 1 :], slot)
        decoded = theirs.decode_image_tokens(codes).permute(0, 3, 1, 2)
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    pictures = pipe.decode_images(codes.view(-1, SIDE, SIDE))
    torch.testing.assert_close(pictures * 2 - 1, decoded, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("executor", ["eager", "native"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_guided_codes_are_those_of_the_plain_loop(imported, request, layout, shape, executor):
    if executor == "native":
        request.getfixturevalue("native_kernels")
    theirs, pipe = transformers_model(shape), Pipeline.load(imported(layout, shape))
    found = pipe.generate_codes(PROMPTS, temperature=0, executor=executor)
    for prompt, codes in zip(PROMPTS, found, strict=True):
        assert codes.flatten().tolist() == greedy(theirs, prompt_ids(prompt), 5.0)
    unguided = pipe.generate_codes(PROMPTS[0], temperature=0, guidance_scale=1.0)
    assert unguided.flatten().tolist() == greedy(theirs, prompt_ids(PROMPTS[0]), 1.0)
    assert not torch.equal(unguided[0], found[0])


def test_greedy_guided_codes_are_what_the_generate_of_transformers_draws(imported):
    theirs, ids = transformers_model("grouped"), torch.tensor([prompt_ids(PROMPTS[0])])
    config, words = theirs.generation_config, tokenizer()
    config.pad_token_id, config.bos_token_id = words.token_to_id(PAD), words.token_to_id(BEGIN)
    config.generation_kwargs = {"boi_token_id": words.token_to_id(START)}
    drawn = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), generation_mode="image", guidance_scale=5, do_sample=False
    )
    pipe = Pipeline.load(imported("transformers", "grouped"))
    assert pipe.generate_codes(PROMPTS[0], temperature=0).flatten().tolist() == drawn[0].tolist()


def test_the_image_tokenizer_encodes_as_llamagens(imported):
    """`transformers` looks for the nearest code without the normalisation that the original has, so the original's."""
    pipe = Pipeline.load(imported())
    tokens = pipe.image_tokenizer
    assert tokens.config.quantizer.l2_normalised and pipe.grid == (SIDE, SIDE)
    images = torch.rand(2, 3, 2 * SIDE, 2 * SIDE, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        theirs = transformers_model().model.vqmodel
        latents = theirs.quant_conv(theirs.encoder(images * 2 - 1)).movedim(1, -1)
        codebook = torch.nn.functional.normalize(theirs.quantize.embedding.weight, dim=-1)
        expected = (torch.nn.functional.normalize(latents, dim=-1) @ codebook.T).argmax(-1)
    assert torch.equal(pipe.encode_images(images), expected)


# ---- prompts ----


def test_a_prompt_takes_the_form_of_the_original(imported):
    words = Pipeline.load(imported()).text_tokenizer
    for prompt in PROMPTS:
        ids = words.encode(prompt)
        assert [*ids, words.start_id] == prompt_ids(prompt)
        assert [*words.null_of(len(ids)), words.start_id] == null_ids(prompt_ids(prompt))
    assert words.decode(words.encode("a cat")) == f"{BEGIN}<|User|>: a cat\n\n<|Assistant|>:"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        ("  \n", "the prompt is empty"),
        (f"a cat{START}", "takes for a marker; leave it out"),
        ("<|User|>: a dog", "takes for a marker"),
        ("long " * 40, "this bundle takes 87"),
        ("half \ud800", "not valid Unicode"),
    ],
)
def test_prompts_that_cannot_be(imported, prompt, message):
    with pytest.raises(InputError, match=message):
        Pipeline.load(imported()).generate_codes(prompt)


# ---- what a bundle does ----


def test_it_draws_from_the_command_line_and_again_from_its_receipt(imported, tmp_path, capsys):
    bundle, picture = str(imported()), tmp_path / "tile.png"
    assert run(["generate", "a red tile", "--bundle", bundle, "-o", str(picture), "--seed", "3"]) == 0
    receipt = read_receipt(picture)
    assert receipt["sampling"]["guidance_scale"] == 5.0 and receipt["sampling"]["temperature"] == 1.0
    assert receipt["executor"] == "eager"
    assert run(["replay", str(picture), "--bundle", bundle]) == 0
    pipe = Pipeline.load(bundle)
    codes = pipe.generate_codes(["two tiles", "a red tile"], seed=[0, 3])
    assert codes[1].flatten().tolist() == receipt["codes"]  # in any company
    *_, last = pipe.stream("a red tile", seed=3)
    assert last.codes.tolist() == receipt["codes"]
    drafted = pipe.generate_codes("a red tile", seed=3, speculative=4, coupling="inverse")
    assert torch.equal(drafted[0], codes[1])
    other = pipe.generate_codes("a red tile", seed=3, negative_prompt="a blue tile")
    assert not torch.equal(other[0], codes[1])
    completed = pipe.complete_codes(codes[1, :2], caption="a red tile", seed=3)
    assert torch.equal(completed[0, :2], codes[1, :2])
    assert pipe.complete_codes(codes[1, :2]).shape == (1, SIDE, SIDE)
    assert run(["info", bundle]) == 0
    assert "guidance_scale=5.0" in capsys.readouterr().out
    assert "pipe.caption" not in Bundle.load(bundle).card()


def test_the_likelihood_of_a_picture_is_that_of_transformers(imported):
    pipe, theirs, codes = Pipeline.load(imported()), transformers_model(), some_codes(2)
    scores = pipe.score_codes(codes.view(-1, SIDE, SIDE), [pipe.whole(prompt) for prompt in PROMPTS])

    def nats(ids: list[int], row: torch.Tensor) -> float:
        log_probs = their_logits(theirs, torch.tensor([ids]), row[None])[0].log_softmax(-1)
        return -float(log_probs.gather(1, row[:, None]).sum())

    ids = [prompt_ids(prompt) for prompt in PROMPTS]
    expected = torch.tensor([nats(*pair) for pair in zip(ids, codes, strict=True)])
    alone = torch.tensor([nats(null_ids(one), row) for one, row in zip(ids, codes, strict=True)])
    torch.testing.assert_close(scores.picture_nll_nats.float(), expected, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(scores.pmi_nats.float(), alone - expected, atol=1e-3, rtol=1e-4)
    assert scores.caption_nll_nats is None
    assert pipe.generate_codes(PROMPTS[0], best_of=2, n=1).shape == (1, SIDE, SIDE)


def test_the_bundle_keeps_what_every_bundle_promises(imported):
    certificate = examine(Bundle.load(imported("original", "grouped")), num_tokens=LENGTH)
    assert certificate.holds, certificate
    names = [check.name for check in certificate.checks]
    assert names[-1] == "text tokenizer: prompts in their form"
    assert "guided and not" in certificate.checks[names.index("drawn together = drawn alone")].found


def test_other_executors_refuse_it_by_name(imported):
    pipe = Pipeline.load(imported())
    for name, kind in EXECUTORS.items():
        if name not in ("eager", "native"):
            assert any("not Janus" in reason for reason in kind.why_not(pipe.model))
            with pytest.raises(InputError, match="not Janus"):
                pipe.generate_codes("a tile", executor=name)


@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
def test_weights_in_fewer_bits_draw_too(imported, storage):
    whole, stored = Pipeline.load(imported()), Pipeline.load(imported(), weights=storage)
    assert stored.model.storage == storage
    rows = some_codes(1).view(1, SIDE, SIDE), [whole.whole("a tile")]
    apart = stored.score_codes(*rows).picture_nll_nats - whole.score_codes(*rows).picture_nll_nats
    assert 0 < float(apart.abs().max()) < 1.0


def test_it_is_asked_for_codes_alone(imported):
    pipe = Pipeline.load(imported())
    whole = pipe.model.logits(torch.randn(2, 32))
    assert whole.shape == (2, pipe.model.vocab_size)
    assert int(whole.isfinite().sum()) == 2 * CODES
    with pytest.raises(ValueError, match="a Janus scores codes alone"):
        pipe.model.logits(torch.randn(2, 32), pipe.layout.slots[0])
    with pytest.raises(InputError, match="never learned p"):
        pipe.complete_caption("a")
    with pytest.raises(InputError, match="no order with image before text"):
        pipe.caption_codes(some_codes(1).view(1, SIDE, SIDE))


def test_a_server_draws_what_the_command_draws(imported):
    pipe = Pipeline.load(imported())
    [expected] = pipe.generate("a red tile", seed=3)
    with Running(pipe, executor="eager") as server:
        asked = {"prompt": "a red tile", "seed": 3}
        status, answer, _ = server.request("POST", "/v1/images/generations", asked)
        assert status == 200 and picture_of(answer["data"][0]["b64_json"]).tobytes() == expected.tobytes()
        for wrong, message in (
            ({"size": "256x256"}, "this model draws 6x6"),
            ({"prompt": f"a cat{START}"}, "takes for a marker"),
            ({"prompt": "long " * 40}, "takes 87"),
        ):
            status, answer, _ = server.request("POST", "/v1/images/generations", asked | wrong)
            assert status == 400 and message in answer["error"]["message"]


# ---- there and back ----


@pytest.mark.parametrize(("layout", "suffix"), [("original", ".bin"), ("transformers", ".safetensors")])
@pytest.mark.parametrize("shape", SHAPES)
def test_imports_of_exports_are_bit_equal(tmp_path, imported, layout, suffix, shape):
    file = tmp_path / f"again{suffix}"
    assert run(["export", "janus", str(imported(layout, shape)), str(file)]) == 0
    assert run(["import", "janus", str(file), "-o", str(tmp_path / "again"), "--quiet"]) == 0
    first, second = Bundle.load(imported(layout, shape)), Bundle.load(tmp_path / "again")
    assert first.weights_sha256 == second.weights_sha256
    assert (first.model.config, first.layout.to_dict()) == (second.model.config, second.layout.to_dict())
    assert first.image_tokenizer.config == second.image_tokenizer.config
    exported = read_weights(file).tensors
    expected = original_state(transformers_model(shape))
    others = ("vision_model.", "aligner.", "language_model.lm_head.", "gen_vision_model.quantize.codebook_used")
    kept = {key: tensor for key, tensor in expected.items() if not key.startswith(others)}
    assert set(exported) == set(kept) and all(torch.equal(exported[key], kept[key]) for key in kept)
    original = (tmp_path / "again.tokenizer.json").read_text(encoding="utf-8")
    assert original == (imported(layout, shape) / "text_tokenizer.json").read_text(encoding="utf-8")


def test_shards_in_bfloat16_are_read_as_they_were_published(tmp_path, checkpoints):
    folder = tmp_path / "shards"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(checkpoints() / name, folder / name)
    state = {key: tensor.bfloat16() for key, tensor in load_file(checkpoints() / "model.safetensors").items()}
    places = {key: f"pytorch_model-0000{1 + number % 2}-of-00002.bin" for number, key in enumerate(state)}
    for file in set(places.values()):
        torch.save({key: tensor for key, tensor in state.items() if places[key] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert run(["import", "janus", str(folder), "-o", str(tmp_path / "out"), "--quiet"]) == 0
    bundle = Bundle.load(tmp_path / "out")
    assert torch.equal(bundle.model.embed_codes.weight, state["gen_embed.weight"].float())
    assert bundle.dtype == torch.float32


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_passed_over_is_named_and_counted(tmp_path, checkpoints, layout, capsys):
    assert run(["import", "janus", str(checkpoints(layout)), "-o", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    state = load_file(checkpoints(layout) / "model.safetensors")
    before = "" if layout == "original" else "model."
    for part in (f"{before}vision_model.", f"{before}aligner."):
        count = sum(key.startswith(part) for key in state)
        assert f"passed over: {part}*, tensors: {count} (it looks at pictures, drawing does not)" in printed
    assert "lm_head.weight dropped: it writes text, drawing does not" in printed
    assert all(f"{key} dropped: " in printed or f"{key} -> " in printed for key in state)
    assert "q_proj.weight -> transformer.blocks.0.attention.qkv.weight [32, 32]" in printed


def reference(folder: Path, checkpoint: Path, shape: str) -> Path:
    """A reference folder whose arrays `transformers` computed."""
    shutil.copytree(checkpoint, folder)
    theirs, ids = transformers_model(shape), prompt_ids(PROMPTS[0])
    both, codes = (torch.tensor([row, row]) for row in (ids, null_ids(ids))), some_codes(2)
    prompts, nulls = both
    drawn = torch.tensor([greedy(theirs, ids, 3.0)] * 2)
    cond, null = (their_logits(theirs, rows, drawn) for rows in (prompts, nulls))
    arrays = {
        "prompt_ids": prompts,
        "null_prompt_ids": nulls,
        "tokens": codes,
        "logits": their_logits(theirs, prompts, codes),
        "logits_uncond": their_logits(theirs, nulls, codes),
        "gen_cfg_ids": drawn,
        "gen_cfg_logits": null + 3.0 * (cond - null),
        "gen_nocfg_ids": torch.tensor([greedy(theirs, ids, 1.0)] * 2),
    }
    np.savez(folder / "io.npz", **{name: array.numpy() for name, array in arrays.items()})
    config = json.loads((folder / "config.json").read_text()) | {"generate": {"cfg_scale": 3.0}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_verify_holds_for_the_checkpoint_and_fails_for_other_weights(tmp_path, checkpoints, capsys):
    folder = reference(tmp_path / "reference", checkpoints("original", "grouped"), "grouped")
    command = ["import", "janus", "-o", str(tmp_path / "out"), "--quiet", "--verify", str(folder)]
    assert run([*command, str(folder)]) == 0
    assert capsys.readouterr().out.count("  holds") == 5
    changed = tmp_path / "changed"
    shutil.copytree(checkpoints("original", "grouped"), changed)
    state = load_file(changed / "model.safetensors")
    state["gen_aligner.layers.0.bias"] += 0.5
    save_file(state, changed / "model.safetensors")
    assert run([*command, str(changed), "--force"]) == 1
    assert "FAILS" in capsys.readouterr().out


# ---- sizes ----


@pytest.mark.parametrize(
    ("name", "language", "expected"),
    [
        (
            "janus-pro-1b",
            {
                "hidden_size": 2048,
                "intermediate_size": 5632,
                "num_attention_heads": 16,
                "num_hidden_layers": 24,
                "num_key_value_heads": 16,
            },
            1_485_053_952,
        ),
        ("janus-pro-7b", {"num_hidden_layers": 30}, 6_591_791_104),
    ],
)
def test_published_sizes_have_the_parameters_of_what_draws(name, language, expected):
    D = language.get("hidden_size", 4096)
    text = {"model_type": "llama", "vocab_size": 102400, "max_position_embeddings": 16384, "torch_dtype": "bfloat16"}
    aligner = {"depth": 2, "input_dim": 8, "n_embed": D, "projector_type": "mlp_gelu"}
    config = {
        "model_type": "multi_modality",
        "language_config": text | language,
        "gen_vision_config": {"cls": "VQ-16", "params": {"image_token_size": 16384, "n_embed": 8}},
        "gen_aligner_config": {"params": aligner},
        "gen_head_config": {"params": {"image_token_embed": D, "image_token_size": 16384, "n_embed": D}},
        "vision_config": {"params": {"image_size": 384}},
    }
    sizes = janus.read_config(config)
    assert sizes.model(100_016) == PRESETS[name]
    assert sizes.image_tokenizer.grid == (24, 24) and sizes.image_tokenizer.image_size == (384, 384)
    with torch.device("meta"):
        model = Janus(PRESETS[name])
    assert model.num_parameters == expected
    pieces = janus.piece_map(PRESETS[name])
    shapes = {piece.key: piece.shape for made_of in pieces.values() for piece in made_of}
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == expected
    assert str(model.config.layout["text to image"]) == f"(text{{..447}}) {START} image{{576}}"


# ---- bad input ----


def refused(tmp_path: Path, capsys, *command: str) -> str:
    assert run(["import", "janus", *command, "-o", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert not (tmp_path / "out").exists() and printed.err.count("\n") == 1
    return printed.err


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("nan", "NaN or infinite"),
        ("missing", "missing: "),
        ("extra", "unexpected: "),
        ("shape", "shape: "),
        ("none", "this is no Janus: expected gen_embed.weight"),
    ],
)
def test_weights_that_are_not_as_they_must_be(tmp_path, checkpoints, layout, fault, message, capsys):
    folder = tmp_path / "spoiled"
    shutil.copytree(checkpoints(layout), folder)
    state = load_file(folder / "model.safetensors")
    key = next(key for key in state if key.endswith("layers.1.mlp.up_proj.weight"))
    codes = next(key for key in state if key.endswith("conv_out.weight") and "decoder" in key)
    if fault == "nan":
        state[codes].view(-1)[0] = torch.nan
    elif fault == "missing":
        del state[key]
    elif fault == "extra":
        state[codes.replace("conv_out", "more")] = torch.zeros(3)
    elif fault == "shape":
        state[key] = state[key][:-1]
    else:
        state = {"model.embed_tokens.weight": torch.zeros(3, 2)}
    save_file(state, folder / "model.safetensors")
    assert message in refused(tmp_path, capsys, str(folder))


def test_files_that_are_none(tmp_path, checkpoints, capsys):
    class Malicious:
        def __reduce__(self):
            return print, ("it ran",)

    folder = tmp_path / "evil"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(checkpoints() / name, folder / name)
    torch.save({"gen_embed.weight": Malicious()}, folder / "pytorch_model.bin")
    assert "nothing in it was run" in refused(tmp_path, capsys, str(folder))
    (folder / "pytorch_model.bin").unlink()
    (folder / "model.safetensors").write_bytes((checkpoints() / "model.safetensors").read_bytes()[:-999])
    assert "cannot be read as safetensors" in refused(tmp_path, capsys, str(folder))
    (folder / "model.safetensors").unlink()
    assert "0 weight files" in refused(tmp_path, capsys, str(folder))


def test_another_grid_is_refused_with_the_sizes_there_are(tmp_path, checkpoints, capsys):
    found = refused(tmp_path, capsys, str(checkpoints()), "--image-size", "256")
    assert "--image-size is 256; this Janus draws 6 × 6 pixels, 3 × 3 codes, and learned no other size: give 6" in found
    assert run(["import", "janus", str(checkpoints()), "-o", str(tmp_path / "out"), "--image-size", "6"]) == 0
    bundle = Bundle.load(tmp_path / "out")
    layout = bundle.layout.to_dict()
    layout["orders"]["text to image"][0] = layout["orders"]["text to image"][0].replace("image{9}", "image{4}")
    with pytest.raises(ValueError, match="this Janus reads"):
        bundle.model.check_layout(type(bundle.layout).from_dict(layout))


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        (
            "language_config",
            {"hidden_size": 40},
            "gen_aligner_config.params.n_embed is 32; the rest of the config says 40",
        ),
        ("language_config", {"intermediate_size": 45}, "the weights do not fit the network"),
        ("language_config", {"num_hidden_layers": 3}, "missing: language_model.model.layers.2"),
        ("language_config", {"num_attention_heads": 5}, "config.language_config.hidden_size 32 is not divisible"),
        ("language_config", {"max_position_embeddings": 10}, "9 codes leave no room for text among 10 positions"),
        ("language_config", {"attention_bias": True}, "asks for biases"),
        ("language_config", {"vocab_size": 262}, "the weights do not fit the network"),
        ("language_config", {"vocab_size": 260}, "start_id is 260; expected an id of text, 0..259"),
        ("language_config", {"model_type": "gpt2"}, "config.language_config.model_type is 'gpt2'"),
        ("gen_vision_config", {"cls": "VQ-8"}, "config.gen_vision_config.cls is 'VQ-8'"),
        ("gen_vision_config", {"params": {"image_token_size": 99}}, "gen_aligner_config.params.input_dim is 3"),
        ("vision_config", {"params": {"image_size": 7}}, "expected a multiple of 2, the pixels of a code"),
    ],
)
def test_a_config_that_disagrees_with_the_weights_or_itself(tmp_path, checkpoints, section, changes, message, capsys):
    config = original_config()
    config[section] |= changes
    (tmp_path / "other.json").write_text(json.dumps(config))
    assert message in refused(tmp_path, capsys, str(checkpoints()), "--config", str(tmp_path / "other.json"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"template": "no place"}, "needs {prompt} once"),
        ({"filler": "<none>"}, "it has no token '<none>'"),
        ({"start": 3}, "prompt: start"),
        ({"more": "x"}, "unknown field more"),
    ],
)
def test_a_bundle_whose_form_of_prompts_is_damaged(tmp_path, imported, changes, message):
    shutil.copytree(imported(), tmp_path / "bundle")
    config = json.loads((tmp_path / "bundle" / "config.json").read_text(encoding="utf-8"))
    config["prompt"] |= changes
    (tmp_path / "bundle" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(InputError, match=message):
        Bundle.load(tmp_path / "bundle")


def test_what_has_to_lie_beside_the_weights(tmp_path, checkpoints, capsys):
    folder = tmp_path / "alone"
    folder.mkdir()
    shutil.copy(checkpoints() / "model.safetensors", folder)
    assert "config.json, or --config" in refused(tmp_path, capsys, str(folder))
    shutil.copy(checkpoints() / "config.json", folder)
    assert "there is no tokenizer.json beside its weights" in refused(tmp_path, capsys, str(folder))
    (folder / "tokenizer.json").write_text("{}")
    assert "is no tokenizer.json of this model" in refused(tmp_path, capsys, str(folder))
    other = tokenizer().to_str().replace(START, "<begin_of_video>")
    (folder / "tokenizer.json").write_text(other, encoding="utf-8")
    assert "it has no token '<begin_of_image>'" in refused(tmp_path, capsys, str(folder))
    (tmp_path / "other.json").write_text('{"hidden_size": 3}')
    shutil.copy(checkpoints() / "tokenizer.json", folder)
    found = refused(tmp_path, capsys, str(folder), "--config", str(tmp_path / "other.json"))
    assert "config is of no Janus: expected the section language_config" in found
    with pytest.raises(InputError, match="or --config"):
        JANUS.read(ForeignWeights(tensors={}, notes=()), None)
