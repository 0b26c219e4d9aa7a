"""Llama in the Hugging Face layout: parity both ways, with reference arrays and with transformers itself."""

import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_bundle import tiny_pipeline

from smalti.bundle import Bundle
from smalti.cli.app import run
from smalti.engine.generate import Request, generate
from smalti.engine.sampling import SampleConfig
from smalti.errors import InputError
from smalti.interop.commands import import_weights, verify
from smalti.interop.huggingface import (
    export_llama,
    halves_to_pairs,
    one_segment_layout,
    pairs_to_halves,
    read_llama,
    read_llama_config,
    split,
    write_generation_config,
)
from smalti.models.config import TransformerConfig
from smalti.models.decoder_only import DecoderOnly, DecoderOnlyConfig
from smalti.sequences.layout import Layout
from smalti.sequences.vocabulary import Vocabulary
from smalti.tasks.images import Pipeline

SETS = ("hf_llama", "hf_llama_gqa_tied")
LLAMA = {
    "model_type": "llama",
    "vocab_size": 23,
    "hidden_size": 12,
    "intermediate_size": 17,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 41,
    "rope_theta": 500.0,
}
ORDER = "text to image"


def transformer(**changes) -> TransformerConfig:
    sizes = {"num_layers": 2, "d_model": 12, "num_heads": 3, "d_ff": 17, "max_length": 19}
    kinds = {"norm": "rms", "feed_forward": "swiglu", "bias": False, "positions": "rotary", "norm_eps": 1e-6}
    return TransformerConfig(**(sizes | kinds | changes))


def random_model(config: DecoderOnlyConfig, seed: int = 0) -> DecoderOnly:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = DecoderOnly(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
    return model.eval()


def picture_layout() -> Layout:
    """Pictures in the middle of the ids, so that what is suppressed lies on both sides."""
    vocabulary = Vocabulary({"text": 5, "image": 11, "special": ["<start>", "<end>", "<pad>"]})
    return Layout.parse(vocabulary, {ORDER: "text{..3} <start> image{7} <end>"})


def transformers_model(directory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(directory).eval()


def test_rows_change_places_within_a_head():
    # Two heads of width 6: channel j turns with j + 3 there, with its neighbour here.
    rows = torch.arange(12)
    assert halves_to_pairs(rows, 2).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert torch.equal(pairs_to_halves(halves_to_pairs(rows, 2), 2), rows)


@pytest.mark.parametrize("name", SETS)
def test_every_reference_output_comes_out(shared_dir, name):
    errors = {error.name: error for error in verify("hf-llama", shared_dir / "golden" / name)}
    assert set(errors) == {"logits", "loss", "generated_ids", "generated_logits"}
    assert all(error.holds for error in errors.values()), errors


@pytest.mark.parametrize("name", SETS)
def test_import_through_the_command_line(shared_dir, tmp_path, capsys, name):
    reference, bundle = shared_dir / "golden" / name, tmp_path / "bundle"
    command = ["import", "hf-llama", str(reference), "-o", str(bundle)]
    assert run([*command, "--verify", str(reference)]) == 0
    printed = capsys.readouterr().out
    assert "model.layers.1.self_attn.k_proj.weight -> transformer.blocks.1.attention.qkv.weight" in printed
    assert printed.count("holds") == 4
    assert Bundle.load(bundle).model.config.tie_embeddings == (name == SETS[1])
    assert run(command) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert run([*command, "--force"]) == 0
    assert run(["import", "hf-llama", str(reference / "model.safetensors"), "-o", str(tmp_path / "from-file")]) == 0


def test_a_changed_tensor_fails_verification_and_nothing_is_written(shared_dir, tmp_path, capsys):
    reference = shared_dir / "golden" / "hf_llama"
    changed = tmp_path / "changed"
    shutil.copytree(reference, changed)
    (changed / "model.safetensors").chmod(0o644)
    state = load_file(reference / "model.safetensors")
    state["model.layers.0.self_attn.q_proj.weight"][0] += 0.1
    save_file(state, changed / "model.safetensors")
    out = tmp_path / "out"
    assert run(["import", "hf-llama", str(changed), "-o", str(out), "--verify", str(reference)]) == 1
    assert not out.exists()
    assert "not reproduced" in capsys.readouterr().err


@pytest.mark.parametrize("name", SETS)
def test_an_imported_model_is_exported_bit_for_bit(shared_dir, tmp_path, name):
    reference = shared_dir / "golden" / name
    import_weights("hf-llama", reference, tmp_path / "bundle")
    export_llama(tmp_path / "bundle", tmp_path / "out")
    expected = load_file(reference / "model.safetensors")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert set(found) == set(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("changes", "tied"),
    [
        ({}, False),
        ({"num_kv_heads": 1, "rotary_base": 500.0, "norm_eps": 1e-4}, True),
        ({"bias": True, "d_model": 20, "num_heads": 5}, False),
    ],
)
def test_transformers_computes_the_same_from_an_export(tmp_path, changes, tied):
    layout = one_segment_layout(23, 19)
    model = random_model(DecoderOnlyConfig(vocab_size=23, transformer=transformer(**changes), tie_embeddings=tied))
    Bundle(model=model, layout=layout, name="random").save(tmp_path / "bundle")
    files, _ = export_llama(tmp_path / "bundle", tmp_path / "llama")
    assert [file.name for file in files] == ["config.json", "generation_config.json", "model.safetensors"]
    theirs = transformers_model(tmp_path / "llama")
    assert type(theirs).__name__ == "LlamaForCausalLM"
    token_ids = torch.randint(23, (3, 13), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = theirs(token_ids).logits
        error = (model.logits(model.hidden(token_ids)) - expected).abs().max()
        assert expected.std() > 0.1
        assert error < 1e-4
        greedy = theirs.generate(token_ids[:, :4], do_sample=False, max_new_tokens=15)
    requests = [Request(given={"text": row[:4]}, order="text") for row in token_ids]
    ours = generate(model, layout, requests, SampleConfig(temperature=0.0))
    assert torch.stack([drawn.token_ids for drawn in ours]).tolist() == greedy.tolist()


def test_transformers_draws_whole_pictures_from_an_export(tmp_path):
    layout = picture_layout()
    model = random_model(DecoderOnlyConfig(vocab_size=19, transformer=transformer()))
    Bundle(model=model, layout=layout, name="pictures").save(tmp_path / "bundle")
    export_llama(tmp_path / "bundle", tmp_path / "llama")
    theirs = transformers_model(tmp_path / "llama")
    words = torch.tensor([[4, 0], [1, 3]])
    start, end = layout.vocabulary.special("<start>"), layout.vocabulary.special("<end>")
    prompts = torch.cat((words, torch.full((2, 1), start)), dim=1)
    torch.manual_seed(0)
    for sampled in (theirs.generate(prompts) for _ in range(5)):
        pictures = sampled[:, 3:]
        assert pictures.shape == (2, 8)
        assert ((pictures[:, :-1] >= 5) & (pictures[:, :-1] < 16)).all()
        assert (pictures[:, -1] == end).all()
    greedy = theirs.generate(prompts, do_sample=False)
    ours = generate(
        model, layout, [Request(order=ORDER, given={"text": row}) for row in words], SampleConfig(temperature=0.0)
    )
    assert torch.stack([drawn.token_ids for drawn in ours]).tolist() == greedy.tolist()


def test_generation_config_says_what_may_follow_a_prompt():
    config = write_generation_config(picture_layout())
    assert config["suppress_tokens"] == [0, 1, 2, 3, 4, 16, 18]
    assert (config["min_new_tokens"], config["max_new_tokens"], config["eos_token_id"]) == (7, 8, 17)
    assert config["pad_token_id"] == 17  # this vocabulary's padding is called otherwise
    bare = Layout.parse(Vocabulary({"special": ["<bos>"], "image": 4}), {"lines": "<bos> image{3}"})
    assert write_generation_config(bare)["suppress_tokens"] == [0]
    assert write_generation_config(bare)["max_new_tokens"] == 3
    assert write_generation_config(one_segment_layout(23, 19)) == {}


def test_an_export_comes_back_with_its_layout(tmp_path):
    layout = picture_layout()
    model = random_model(DecoderOnlyConfig(vocab_size=19, transformer=transformer(num_kv_heads=1)))
    Bundle(model=model, layout=layout, name="pictures").save(tmp_path / "bundle")
    assert run(["export", "hf", str(tmp_path / "bundle"), str(tmp_path / "llama")]) == 0
    assert run(["import", "hf-llama", str(tmp_path / "llama"), "-o", str(tmp_path / "back"), "--quiet"]) == 0
    back = Bundle.load(tmp_path / "back")
    assert back.layout.to_dict() == layout.to_dict()
    assert back.model.config == model.config
    assert all(torch.equal(back.model.state_dict()[key], tensor) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"positions": "rotary_2d", "grid": (3, 5), "prefix_length": 4}, "2-D rotary positions"),
        ({"norm": "layer"}, r"LayerNorm \(a Llama has RMSNorm\)"),
        ({"positions": "learned"}, "positions 'learned'"),
        ({"feed_forward": "gelu", "qk_norm": True}, "'gelu'.*norms of queries and keys"),
        ({"d_model": 25, "head_width": 8}, "a d_model of 25 that 3 heads do not divide"),
    ],
)
def test_what_a_llama_cannot_be_is_refused(tmp_path, changes, reason):
    changes = {"d_model": 24} | changes
    model = random_model(DecoderOnlyConfig(vocab_size=23, transformer=transformer(**changes)))
    Bundle(model=model, layout=one_segment_layout(23, 19), name="other").save(tmp_path / "bundle")
    with pytest.raises(InputError, match=f"cannot be written as a Llama.*{reason}"):
        export_llama(tmp_path / "bundle", tmp_path / "llama")
    assert not (tmp_path / "llama").exists()


def test_a_bundle_of_pictures_is_read_too(tmp_path):
    tiny_pipeline().save(tmp_path / "bundle")
    with pytest.raises(InputError, match="LayerNorm"):
        export_llama(tmp_path / "bundle", tmp_path / "llama")
    found = Bundle.load(tmp_path / "bundle")
    assert found.layout.to_dict() == Pipeline.load(tmp_path / "bundle").layout.to_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2"}, r"config\.model_type is 'qwen2'; only 'llama'"),
        ({"hidden_act": "gelu"}, r"config\.hidden_act is 'gelu'"),
        ({"head_dim": 5}, r"rotary positions need an even head width, not 5"),
        ({"hidden_size": 13}, r"config\.hidden_size 13 is not divisible"),
        ({"attention_bias": "yes"}, r"config\.attention_bias is 'yes'; expected bool"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, r"config\.rope_scaling\.rope_type is 'llama3'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, r"config\.rope_scaling\.type is 'linear'"),
        ({"rope_scaling": {"type": "linear"}}, "rotary positions that are scaled are not supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, r"config\.rope_parameters\.rope_type is 'yarn'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor is 0\.5"),
        ({"rope_parameters": {"rope_theta": 7.0}}, "rope_theta twice, as 7.0 and 500.0"),
        ({"num_key_value_heads": 2}, "num_heads 3 is not divisible by num_kv_heads 2"),
        ({"sliding_window": 64}, r"config\.sliding_window asks for attention to a window of the last tokens"),
        ({"add_cross_attention": True}, r"config\.add_cross_attention asks for cross-attention"),
        ({"quantization_config": {"bits": 4}}, r"config\.quantization_config asks for quantized weights"),
        ({"residual_multiplier": 0.2}, r"config\.residual_multiplier is not a field known here"),
        ({"vocab_size": "many"}, r"config\.vocab_size is 'many'"),
    ],
)
def test_a_config_that_asks_for_more_is_refused_by_field(changes, message):
    with pytest.raises(InputError, match=message):
        read_llama_config(LLAMA | changes)


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "linear", "factor": 1.0},
        {"rope_type": "dynamic", "factor": 1},
        {"rope_type": "llama3", "factor": 1.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ],
)
def test_positions_scaled_by_one_are_not_scaled(scaling):
    assert read_llama_config(LLAMA | {"rope_scaling": scaling}) == read_llama_config(LLAMA)


def test_a_config_may_have_its_rotary_base_in_either_place():
    assert read_llama_config(LLAMA).ours.transformer.rotary_base == 500.0
    newer = {key: value for key, value in LLAMA.items() if key != "rope_theta"}
    assert read_llama_config(newer).ours.transformer.rotary_base == 10000.0
    newer["rope_parameters"] = {"rope_type": "default", "rope_theta": 7}
    assert read_llama_config(newer).ours.transformer.rotary_base == 7.0
    assert read_llama_config(LLAMA | {"rope_scaling": None}).ours.transformer.kv_heads == 1


def test_what_is_null_or_off_asks_for_nothing():
    off = {"sliding_window": None, "quantization_config": None, "rms_norm_eps": None, "add_cross_attention": False}
    assert read_llama_config(LLAMA | off).ours.transformer.norm_eps == 1e-6


@pytest.fixture
def foreign(tmp_path):
    """A small folder in their layout, and its tensors."""
    state = split(random_model(read_llama_config(LLAMA).ours))
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return tmp_path, state


def test_shards_bfloat16_and_derived_tensors_are_read(foreign):
    folder, state = foreign
    state = {key: tensor.bfloat16() for key, tensor in state.items()}
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    names = sorted(state)
    places = {key: f"model-{i % 2 + 1:05d}-of-00002.safetensors" for i, key in enumerate(names)}
    for file in sorted(set(places.values())):
        save_file({key: state[key] for key in names if places[key] == file}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    found = read_llama(folder)
    assert found.report.dropped == (("model.layers.0.self_attn.rotary_emb.inv_freq", "computed from the config"),)
    assert torch.equal(found.model.head, state["lm_head.weight"].float())
    index.write_text(json.dumps({"weight_map": places | {"lm_head.weight": "../secret.safetensors"}}))
    with pytest.raises(InputError, match=r"names the shard '\.\./secret\.safetensors'"):
        read_llama(folder)
    for name, shown in ((["a"], r"\['a'\]"), (7, "7"), (None, "None")):
        index.write_text(json.dumps({"weight_map": places | {"lm_head.weight": name}}))
        with pytest.raises(InputError, match=rf"index\.json names the shard {shown}; expected the name of a file"):
            read_llama(folder)


def test_tensors_that_do_not_fit_are_named(foreign):
    folder, state = foreign
    key = "model.layers.1.mlp.up_proj.weight"
    save_file({k: v for k, v in state.items() if k != key}, folder / "model.safetensors")
    with pytest.raises(InputError, match=rf"missing: {key} \[17, 12\]"):
        read_llama(folder)
    save_file(state | {"model.layers.2.extra": torch.ones(3)}, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"unexpected: model\.layers\.2\.extra \[3\]"):
        read_llama(folder)
    save_file(state | {key: torch.ones(17, 11)}, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"is \[17, 11\], expected \[17, 12\]"):
        read_llama(folder)


def test_tied_weights_may_be_repeated_but_must_agree(foreign):
    folder, state = foreign
    (folder / "config.json").write_text(json.dumps(LLAMA | {"tie_word_embeddings": True}))
    same = state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}
    save_file(same, folder / "model.safetensors")
    assert read_llama(folder).report.dropped[0][0] == "lm_head.weight"
    save_file(state, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"tie_word_embeddings is True, but lm_head\.weight is not"):
        read_llama(folder)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("adapter_config.json", "adapter_model.safetensors"), "It holds an adapter: .*merge_and_unload"),
        (("model.gguf", "config.json"), r"model\.gguf is a GGUF file of llama\.cpp: take the original weights"),
        (("params.json", "consolidated.00.pth"), "It is in Meta's own layout: .*convert_llama_weights_to_hf"),
        (("c2i.pt",), r"It has c2i\.pt: give the file itself"),
        (("notes.md",), r"It has notes\.md\.$"),
    ],
)
def test_a_folder_of_another_kind_says_what_to_do(tmp_path, files, message):
    for name in files:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InputError, match=f"holds no weights: expected model.safetensors.*{message}"):
        read_llama(tmp_path)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("base_model.model.layers.0.q_proj.lora_A.weight", "is an adapter .*not a whole model; give the whole model"),
        ("tok_embeddings.weight", "is a Llama in Meta's own layout"),
        ("layers.0.attention.wqkv.weight", "is a GPT of LlamaGen"),
    ],
)
def test_a_file_of_another_kind_is_known_by_its_keys(foreign, key, message):
    folder, _ = foreign
    tensors = {key: torch.zeros(2, 3)} | ({"tok_embeddings.weight": torch.zeros(2, 3)} if "wqkv" in key else {})
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=message):
        read_llama(folder)


def test_weights_that_are_not_finite_are_refused_by_name(foreign):
    folder, state = foreign
    broken = dict(state)
    broken["model.norm.weight"] = torch.full_like(state["model.norm.weight"], float("inf"))
    save_file(broken, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.norm\.weight holds 12 of 12 values that are NaN or infinite"):
        read_llama(folder)
    assert "model.norm.weight" in read_llama(folder, allow_nonfinite=True).report.notes[0]


def test_a_folder_without_weights_and_an_export_in_the_way(foreign, tmp_path, capsys):
    folder, _ = foreign
    with pytest.raises(InputError, match=r"holds no weights: expected model\.safetensors"):
        read_llama(folder)
    model = random_model(read_llama_config(LLAMA).ours)
    Bundle(model=model, layout=one_segment_layout(23, 41), name="small").save(tmp_path / "bundle")
    out = tmp_path / "precious"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="exists and is not empty"):
        export_llama(tmp_path / "bundle", out)
    with pytest.raises(InputError, match="holds no Llama, so --force does not replace it"):
        export_llama(tmp_path / "bundle", out, force=True)
    assert (out / "thesis.txt").exists()
    export_llama(tmp_path / "bundle", tmp_path / "llama")
    assert export_llama(tmp_path / "bundle", tmp_path / "llama", force=True)[0]
