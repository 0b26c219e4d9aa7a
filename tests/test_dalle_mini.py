"""DALL·E mini's layout against min-dalle's formulas written out: import, logits, drawing, export to the same bits."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from smalti.bundle import Bundle
from smalti.cli.app import run
from smalti.engine.executors import EXECUTORS
from smalti.engine.generate import generate
from smalti.engine.sampling import SampleConfig
from smalti.errors import InputError
from smalti.interop.dalle_mini import infer_config, read_config, read_dalle_mini, write_config
from smalti.models.config import TransformerConfig
from smalti.models.decoder_only import DecoderOnly, DecoderOnlyConfig
from smalti.sequences.request import Request
from smalti.tasks.doctor import examine
from smalti.training.native_loss import why_not

D, HEADS, WIDE, TEXT, LENGTH, CODES, LAYERS = 128, 2, 29, 7, 9, 37, {"encoder": 2, "decoder": 3}
BEGIN, PAD, END = 0, 1, 2


def words() -> Tokenizer:
    """Markers first, as BART has them, and bytes behind them."""
    pieces = ["<s>", "<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    found = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    found.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in pieces[:3]])
    return found


VOCABULARY = words().get_vocab_size() + 5
"""More than the tokenizer has, as the published ones."""


def foreign_state() -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.1

    def norm(name: str, width: int = D) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": 1 + tensor(width), f"{name}.bias": tensor(width)}

    found: dict[str, dict[str, torch.Tensor]] = {}
    for part, tables in (("encoder", (VOCABULARY, TEXT)), ("decoder", (CODES + 1, LENGTH))):
        state = {"embed_tokens.weight": 5 * tensor(tables[0], D), "embed_positions.weight": tensor(tables[1], D)}
        state |= {**norm("layernorm_embedding"), **norm("final_ln")}
        for layer in range(LAYERS[part]):
            at = f"layers.{layer}"
            kinds = {"self_attn": ("pre_self_attn_layer_norm", "self_attn_layer_norm")}
            if part == "decoder":
                kinds["encoder_attn"] = ("pre_encoder_attn_layer_norm", "encoder_attn_layer_norm")
            for kind, norms in kinds.items():
                state |= {f"{at}.{kind}.{name}_proj.weight": tensor(D, D) for name in ("q", "k", "v", "out")}
                state |= {key: value for name in norms for key, value in norm(f"{at}.{name}").items()}
            state |= {f"{at}.glu.{name}.weight": tensor(WIDE, D) for name in ("fc0", "fc1")}
            state |= {f"{at}.glu.fc2.weight": tensor(D, WIDE), **norm(f"{at}.glu.ln0"), **norm(f"{at}.glu.ln1", WIDE)}
        if part == "decoder":
            state["lm_head.weight"] = tensor(CODES + 1, D)
        found[part] = state
    return found


def min_dalle_logits(state: dict[str, dict[str, torch.Tensor]], text: list[int], codes: list[int]) -> torch.Tensor:
    """Scores of the code behind `<sot>` and each of the codes: min_dalle/models/dalle_bart_{encoder,decoder}.py, text
    padded to its full length and the padding masked."""

    def norm(part, name, x):
        return F.layer_norm(x, x.shape[-1:], state[part][f"{name}.weight"], state[part][f"{name}.bias"])

    def attend(part, name, x, source, seen):
        q, k, v = (
            (y @ state[part][f"{name}.{kind}_proj.weight"].T).unflatten(-1, (HEADS, -1)).transpose(0, 1)
            for y, kind in ((x, "q"), (source, "k"), (source, "v"))
        )
        scores = (q / math.sqrt(D / HEADS)) @ k.mT + torch.where(seen, 0.0, -1e12)
        return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1) @ state[part][f"{name}.out_proj.weight"].T

    def glu(part, name, x):
        x = norm(part, f"{name}.ln0", x)
        gate = F.gelu(x @ state[part][f"{name}.fc0.weight"].T)
        x = norm(part, f"{name}.ln1", gate * (x @ state[part][f"{name}.fc1.weight"].T))
        return x @ state[part][f"{name}.fc2.weight"].T

    ids = torch.tensor([*text, *[PAD] * (TEXT - len(text))])
    real = (ids != PAD)[None]
    x = state["encoder"]["embed_tokens.weight"][ids] + state["encoder"]["embed_positions.weight"]
    x = norm("encoder", "layernorm_embedding", x)
    for layer in range(LAYERS["encoder"]):
        at = f"layers.{layer}"
        y = norm("encoder", f"{at}.pre_self_attn_layer_norm", x)
        x = x + norm("encoder", f"{at}.self_attn_layer_norm", attend("encoder", f"{at}.self_attn", y, y, real))
        x = x + glu("encoder", f"{at}.glu", x)
    encoded = norm("encoder", "final_ln", x)
    inputs = torch.tensor([CODES, *codes])
    x = state["decoder"]["embed_tokens.weight"][inputs] + state["decoder"]["embed_positions.weight"][: len(inputs)]
    x = norm("decoder", "layernorm_embedding", x)
    causal = torch.ones(len(inputs), len(inputs), dtype=torch.bool).tril()
    for layer in range(LAYERS["decoder"]):
        at = f"layers.{layer}"
        y = norm("decoder", f"{at}.pre_self_attn_layer_norm", x)
        x = x + norm("decoder", f"{at}.self_attn_layer_norm", attend("decoder", f"{at}.self_attn", y, y, causal))
        y = norm("decoder", f"{at}.pre_encoder_attn_layer_norm", x)
        looked = attend("decoder", f"{at}.encoder_attn", y, encoded, real)
        x = x + norm("decoder", f"{at}.encoder_attn_layer_norm", looked)
        x = x + glu("decoder", f"{at}.glu", x)
    return norm("decoder", "final_ln", x) @ state["decoder"]["lm_head.weight"].T


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("min-dalle")
    for part, state in foreign_state().items():
        torch.save(state, folder / f"{part}.pt")
    words().save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def bundle(published):
    assert run(["import", "dalle-mini", str(published), "-o", str(published / "bundle"), "--quiet"]) == 0
    return Bundle.load(published / "bundle")


TEXTS = [[BEGIN, 50, 60, END], [BEGIN, END], [BEGIN, 9, 8, 7, 6, 5, END]]


def request_of(bundle, text: list[int], **settings) -> Request:
    return Request(order="text to image", given={"text": torch.tensor(text[:-1])}, **settings)


@torch.no_grad()
def test_whole_sequences_score_as_min_dalle(bundle):
    model, layout = bundle.model, bundle.layout
    codes = torch.randint(CODES, (len(TEXTS), LENGTH), generator=torch.Generator().manual_seed(1))
    state = foreign_state()
    for text, row in zip(TEXTS, codes, strict=True):
        markers = [layout.vocabulary.special(name) for name in ("<eot>", "<sot>")]
        ids = torch.tensor([[*text[:-1], *markers, *layout.vocabulary.ids("image", row[:-1]).tolist()]])
        slot = next(filter(model.can_score, layout.slots))
        found = model.logits(model.hidden(ids), slot)[0, len(text) :]
        expected = min_dalle_logits(state, text, row[:-1].tolist())[:, :CODES]  # as the original, without `<sot>`
        assert found.shape == expected.shape and torch.allclose(found, expected, atol=1e-4)


@torch.no_grad()
def test_it_draws_greedily_and_guided_as_min_dalle(bundle):
    state, scale = foreign_state(), 3.0
    null = request_of(bundle, TEXTS[1])
    requests = [request_of(bundle, text, null=null) for text in (TEXTS[0], TEXTS[2])]
    drawn = generate(bundle.model, bundle.layout, requests, SampleConfig(temperature=0, guidance_scale=scale))
    for text, found in zip((TEXTS[0], TEXTS[2]), drawn, strict=True):
        codes: list[int] = []
        for _ in range(LENGTH):
            plain, guided = (min_dalle_logits(state, one, codes)[-1, :CODES] for one in (TEXTS[1], text))
            codes.append(int((plain * (1 - scale) + guided * scale).argmax()))
        assert found.spans["image"].tolist() == codes


def test_the_bundle_keeps_its_promises_and_draws_of_words(bundle):
    assert bundle.sampling.picture.guidance_scale == 16.0
    certificate = examine(bundle, num_tokens=LENGTH)
    assert certificate.holds, [check for check in certificate.checks if not check.holds]
    assert bundle.text_tokenizer.encode("ab") == [BEGIN, *words().encode("ab").ids]
    assert bundle.text_tokenizer.null_of(4) == [BEGIN]
    assert "it has no GEGLU" in EXECUTORS["native"].why_not(bundle.model)


def test_it_is_exported_to_the_same_bits(bundle, published, tmp_path):
    file = tmp_path / "again.pt"
    assert run(["export", "dalle-mini", str(published / "bundle"), str(file)]) == 0
    again = torch.load(file, weights_only=True)
    state = {f"{part}.{key}": value for part, tensors in foreign_state().items() for key, value in tensors.items()}
    assert again.keys() == state.keys() and all(torch.equal(again[key], state[key]) for key in state)
    assert run(["import", "dalle-mini", str(file), "-o", str(tmp_path / "bundle"), "--quiet"]) == 0
    assert Bundle.load(tmp_path / "bundle").weights_sha256 == bundle.weights_sha256
    assert json.loads((tmp_path / "again.config.json").read_text())["encoder_attention_heads"] == HEADS


def test_sizes_are_those_of_the_published_files():
    def tables(text, codes, width, wide, layers):
        shapes = {"encoder.embed_tokens": (text, width), "encoder.embed_positions": (64, width)}
        shapes |= {"decoder.embed_tokens": (codes + 1, width), "decoder.embed_positions": (256, width)}
        shapes |= {f"{part}.layers.{layers - 1}.glu.fc0": (wide, width) for part in LAYERS}
        shapes["encoder.layers.0.glu.fc0"] = (wide, width)
        return {f"{name}.weight": torch.empty(shape, device="meta") for name, shape in shapes.items()}

    mini = read_config(infer_config(tables(50264, 16384, 1024, 2730, 12)))
    assert (mini.num_heads, mini.encoder_layers, mini.codebook_size, mini.spare_codes) == (16, 12, 16384, 0)
    assert (mini.max_text, mini.grid, mini.d_ff) == (63, (16, 16), 2730)
    mega = read_config(infer_config(tables(50272, 16415, 2048, 4096, 24)))
    assert (mega.num_heads, mega.decoder_layers, mega.codebook_size, mega.spare_codes) == (32, 24, 16384, 31)
    assert read_config(write_config(mega)) == mega


def test_what_does_not_fit_is_said(published, tmp_path, capsys):
    state = {f"{part}.{key}": value for part, tensors in foreign_state().items() for key, value in tensors.items()}
    with pytest.raises(InputError, match="this is no DALL·E mini: it has no encoder"):
        read_dalle_mini({"blocks.0.weight": torch.zeros(2)}, None)
    with pytest.raises(InputError, match=r"decoder\.layers\.1\.glu\.ln1\.bias"):
        read_dalle_mini({key: value for key, value in state.items() if key != "decoder.layers.1.glu.ln1.bias"}, None)
    with pytest.raises(InputError, match=r"config\.image_length is 8; expected a square number"):
        read_dalle_mini(state, infer_config(state) | {"image_length": 8})
    torch.save(state, tmp_path / "alone.pt")
    assert run(["import", "dalle-mini", str(tmp_path / "alone.pt"), "-o", str(tmp_path / "bundle")]) == 2
    assert "there is no tokenizer.json beside its weights" in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()


def test_executors_that_know_plain_blocks_alone_refuse_these():
    sizes = dict(num_layers=1, d_model=16, num_heads=2, d_ff=16, max_length=4)
    for change, reason in (({"normformer": True}, "normformer"), ({"feed_forward": "geglu"}, "GEGLU")):
        shape = TransformerConfig(**sizes, **change)
        model = DecoderOnly(DecoderOnlyConfig(vocab_size=5, transformer=shape)).eval()
        for name in ("packed", "native", "cuda_graph"):
            assert reason in "; ".join(EXECUTORS[name].why_not(model))
        assert why_not(model) is not None
        assert DecoderOnlyConfig.from_dict(model.config.to_dict()) == model.config
