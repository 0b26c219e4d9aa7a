"""Llamas of any size: built by transformers itself, read here, compared, written, and read by transformers again."""

import json
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_bundle import tiny_bpe_pipeline

from smalti.bundle import Bundle
from smalti.cli.app import run
from smalti.interop.huggingface import export_llama, greedy_ids, read_llama
from smalti.tasks.images import Pipeline

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")

LENGTH, NUM_GIVEN = 13, 4
PLAIN = dict(
    vocab_size=29, hidden_size=20, intermediate_size=23, num_hidden_layers=2, num_attention_heads=5,
    num_key_value_heads=5, max_position_embeddings=41, bos_token_id=None, eos_token_id=None,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Case:
    """A config, and how its weights lie."""

    changes: dict
    files: str = "one"
    dtype: torch.dtype = torch.float32


CASES = {
    "narrow heads": Case(changes=dict(head_dim=2)),
    "wide heads, grouped": Case(changes=dict(head_dim=14, num_attention_heads=4, num_key_value_heads=2)),
    "one key-value head, tied": Case(changes=dict(num_key_value_heads=1, tie_word_embeddings=True), files="shards"),
    "biases of attention": Case(changes=dict(attention_bias=True), files="bin", dtype=torch.bfloat16),
    "biases of the feed-forward": Case(changes=dict(mlp_bias=True), files="bin shards"),
    "both, another base": Case(
        changes=dict(
            attention_bias=True,
            mlp_bias=True,
            rms_norm_eps=1e-3,
            rope_parameters={"rope_type": "default", "rope_theta": 70.0},
        ),
        dtype=torch.float16,
    ),
    "padded vocabulary": Case(changes=dict(vocab_size=64), files="shards", dtype=torch.bfloat16),
}


def reference(case: Case, folder: Path):
    """Their model of random weights, in float32, and its folder in the form of the reference folders."""
    config = transformers.LlamaConfig(**(PLAIN | case.changes))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
        token_ids = torch.randint(config.vocab_size, (3, LENGTH))
    model.to(case.dtype)
    if "bin" not in case.files:
        model.save_pretrained(folder, max_shard_size="4KB" if case.files == "shards" else "1GB")
        assert len(list(folder.glob("*.safetensors"))) > (case.files == "shards")
    else:
        config.save_pretrained(folder)
        _save_bin(model.state_dict(), folder, num_files=2 if case.files == "bin shards" else 1)
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt_ids = token_ids[:, :NUM_GIVEN]
    with torch.inference_mode():
        drawn = model.generate(
            prompt_ids,
            attention_mask=torch.ones_like(prompt_ids),
            do_sample=False,
            max_new_tokens=LENGTH - NUM_GIVEN,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        known = model(token_ids, labels=token_ids)
    arrays = {
        "input_ids": token_ids,
        "prompt_ids": prompt_ids,
        "logits": known.logits,
        "loss": known.loss,
        "generated_ids": drawn.sequences,
        "generated_logits": torch.stack(drawn.logits, dim=1),
    }
    np.savez(folder / "io.npz", **{name: tensor.numpy() for name, tensor in arrays.items()})
    return model, arrays


def _save_bin(state: dict[str, torch.Tensor], folder: Path, num_files: int) -> None:
    if num_files == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    places = {key: f"pytorch_model-{i % num_files + 1:05d}-of-{num_files:05d}.bin" for i, key in enumerate(state)}
    for file in set(places.values()):
        torch.save({key: tensor for key, tensor in state.items() if places[key] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


@pytest.mark.parametrize("name", CASES)
def test_any_llama_is_read_computed_and_written_as_transformers_has_it(tmp_path, capsys, name: str):
    model, arrays = reference(CASES[name], tmp_path / "theirs")
    found = read_llama(tmp_path / "theirs").model
    with torch.inference_mode():
        logits = found.logits(found.hidden(arrays["input_ids"]))
    assert arrays["logits"].std() > 0.1
    torch.testing.assert_close(logits, arrays["logits"], atol=1e-4, rtol=0)
    assert torch.equal(greedy_ids(found, arrays["prompt_ids"], LENGTH), arrays["generated_ids"])
    command = ["import", "hf-llama", str(tmp_path / "theirs"), "-o", str(tmp_path / "bundle"), "--quiet"]
    assert run([*command, "--verify", str(tmp_path / "theirs")]) == 0
    assert capsys.readouterr().out.count("holds") == 4
    assert run(["export", "hf", str(tmp_path / "bundle"), str(tmp_path / "back")]) == 0
    back = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert set(back.state_dict()) == set(model.state_dict())
    assert all(torch.equal(back.state_dict()[key], tensor) for key, tensor in model.state_dict().items())
    with torch.inference_mode():
        assert torch.equal(back(arrays["input_ids"]).logits, model(arrays["input_ids"]).logits)


@pytest.mark.parametrize("array", ["logits", "loss", "generated_ids", "generated_logits"])
def test_one_changed_number_of_any_array_fails(tmp_path, capsys, array: str):
    _, arrays = reference(CASES["wide heads, grouped"], tmp_path / "theirs")
    changed = {name: tensor.numpy().copy() for name, tensor in arrays.items()}
    number = changed[array].reshape(-1)
    number[-1] = (number[-1] + 1) % 29 if array == "generated_ids" else number[-1] + 3e-4
    np.savez(tmp_path / "theirs" / "io.npz", **changed)
    command = ["import", "hf-llama", str(tmp_path / "theirs"), "-o", str(tmp_path / "bundle"), "--quiet"]
    assert run([*command, "--verify", str(tmp_path / "theirs")]) == 1
    printed = capsys.readouterr()
    assert [line.split()[0] for line in printed.out.splitlines() if "FAILS" in line] == [array]
    assert not (tmp_path / "bundle").exists()


def test_what_transformers_saves_again_comes_back_with_its_layout_and_ids(tmp_path):
    pipe = tiny_bpe_pipeline()
    pipe.save(tmp_path / "bundle")
    export_llama(tmp_path / "bundle", tmp_path / "llama")
    tuned = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "llama")
    tuned.resize_token_embeddings(pad_to_multiple_of=64, mean_resizing=False)
    for part in (tuned, words):
        part.save_pretrained(tmp_path / "tuned")  # which sorts the keys of the config
    assert run(["import", "hf-llama", str(tmp_path / "tuned"), "-o", str(tmp_path / "back"), "--quiet"]) == 0
    vocabulary = Bundle.load(tmp_path / "back").layout.vocabulary
    size = pipe.layout.vocabulary.size
    assert vocabulary.to_dict() == pipe.layout.vocabulary.to_dict() | {"padding": 64 - size % 64}
    assert repr(vocabulary).startswith(repr(pipe.layout.vocabulary).rstrip(")"))  # the segments in their order
    files, notes = export_llama(tmp_path / "back", tmp_path / "again")
    assert notes == () and "tokenizer.json" in [file.name for file in files]
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(again[key], tensor) for key, tensor in tuned.state_dict().items())


def test_a_tokenizer_of_an_export_pads_a_batch_and_can_read_typed_markers_as_text(tmp_path):
    pipe: Pipeline = tiny_bpe_pipeline()
    pipe.save(tmp_path / "bundle")
    export_llama(tmp_path / "bundle", tmp_path / "llama")
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama").eval()
    offset = pipe.layout.vocabulary["text"].offset
    for caption in ("<|endofimage|> a dog", "e\u0301 \u202e\x07 👩🏿\u200d🚀", "  two  cats "):
        ours = [number + offset for number in pipe.text_tokenizer.encode(caption)]
        assert words(caption, split_special_tokens=True)["input_ids"] == ours
        assert words.decode(ours) == caption
    captions = ["a purple dog on a red tree", "two", ""]
    prompts = words([f"{caption}<|startofimage|>" for caption in captions], return_tensors="pt", padding=True)
    drawn = model.generate(**prompts, do_sample=False)[:, prompts.input_ids.shape[1] :]
    ours = pipe.generate_codes(captions, temperature=0.0).flatten(1)
    assert torch.equal(drawn[:, :-1] - pipe.layout.vocabulary["image"].offset, ours)
    assert set(drawn[:, -1].tolist()) == {words.eos_token_id}


def test_a_layout_in_a_form_that_saving_again_could_spoil_is_refused(tmp_path, capsys):
    tiny_bpe_pipeline().save(tmp_path / "bundle")
    export_llama(tmp_path / "bundle", tmp_path / "llama")
    path = tmp_path / "llama" / "config.json"
    config = json.loads(path.read_text())
    config["smalti_layout"]["vocabulary"] = dict(config["smalti_layout"]["vocabulary"])
    path.write_text(json.dumps(config))
    command = ["import", "hf-llama", str(tmp_path / "llama"), "-o", str(tmp_path / "back")]
    assert run(command) == 2
    assert "its vocabulary is not a list of names with values; export the bundle again" in capsys.readouterr().err
    del config["smalti_layout"]
    path.write_text(json.dumps(config))
    assert run(command) == 0
    shutil.rmtree(tmp_path / "back")
