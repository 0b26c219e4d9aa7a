"""LlamaGen and RAR against the arrays of their originals: whole sequences, and drawn greedily through the engine."""

import json
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from smalti.engine.beam import beam_search
from smalti.engine.engine import Engine
from smalti.engine.executors import base, make_executor
from smalti.engine.generate import best_of, generate
from smalti.engine.sampling import SampleConfig
from smalti.errors import InputError
from smalti.interop import rar
from smalti.interop.llamagen_gpt import read_llamagen
from smalti.interop.rar import read_rar
from smalti.models import config as transformer_config
from smalti.models.base import Inputs, SequenceModel
from smalti.models.config import TransformerConfig
from smalti.models.decoder_only import DecoderOnlyConfig, new_model
from smalti.models.loss import slot_nll, slot_targets, token_nll
from smalti.models.rar import PRESETS, RAR, RARConfig
from smalti.sequences.layout import Layout, Slot, SpanValues
from smalti.sequences.request import Request
from smalti.sequences.vocabulary import FEATURE, FEATURES, Vocabulary

NO_GUIDANCE = SampleConfig(temperature=0)
TOLERANCE, GUIDED_TOLERANCE = 1e-4, 5e-4


class Golden(NamedTuple):
    model: SequenceModel
    layout: Layout
    image: Slot
    io: dict[str, torch.Tensor]
    config: dict

    def image_logits(self, inputs) -> torch.Tensor:
        return self.model.logits(self.model.hidden(inputs), self.image)

    def guidance(self, **changes) -> SampleConfig:
        return SampleConfig(temperature=0, guidance_scale=self.config["generate"]["cfg_scale"], **changes)


@pytest.fixture
def golden(shared_dir):
    @cache
    def read(name: str) -> Golden:
        folder = shared_dir / "golden" / name
        config = json.loads((folder / "config.json").read_text())
        file = next(folder.glob("weights.*"))
        state = torch.load(file, weights_only=True)
        if name == "rar":
            model = read_rar(state, config)[0]
            layout = model.config.layout
        else:
            model, layout, _ = read_llamagen(state["model"], config)
        segment = layout.vocabulary["image"]
        with np.load(folder / "io.npz") as arrays:
            io = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
        return Golden(model, layout, Slot(((segment.offset, segment.end),)), io, config)

    return read


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> bool:
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=0, atol=tolerance)


def drawn(monkeypatch, golden: Golden, requests: list[Request], config: SampleConfig, executor: str = "eager"):
    """The codes that the engine draws, and the logits that each was drawn from."""
    seen, plain = [], base.sample

    def recorded(logits, uniforms, config):
        seen.append(logits)
        return plain(logits, uniforms, config)

    monkeypatch.setattr(base, "sample", recorded)
    engine = Engine(golden.model, golden.layout, capacity=len(requests), executor=executor)
    for request in requests:
        engine.submit(request, config)
    engine.run()
    ids = torch.stack([engine.take(ticket).spans["image"] for ticket in range(len(requests))])
    return ids, torch.stack(seen, dim=1)


# ---- LlamaGen from labels ----


def labelled(golden: Golden, class_ids: torch.Tensor, order: str = "label to image") -> list[Request]:
    null = int(golden.layout.vocabulary["label"].size) - 1
    return [
        Request(
            order=order, given={"label": label[None]}, null=Request(order=order, given={"label": torch.tensor([null])})
        )
        for label in class_ids
    ]


def packed_pictures(golden: Golden, labels: torch.Tensor):
    tokens = golden.io["tokens"]
    lengths = torch.full((len(tokens),), tokens.shape[1])
    spans = {"label": SpanValues(labels[:, None], torch.ones_like(lengths)), "image": SpanValues(tokens, lengths)}
    return golden.layout.pack(next(iter(golden.layout.orders)), spans)


@torch.no_grad()
def test_llamagen_from_labels_scores_as_the_original(golden):
    c2i = golden("llamagen_gpt_c2i")
    assert close(c2i.model.transformer.table, c2i.io["freqs_cis"], 1e-6)
    for labels, logits in (("class_ids", "logits"), ("null_class_ids", "logits_uncond")):
        token_ids = packed_pictures(c2i, c2i.io[labels]).token_ids
        assert close(c2i.image_logits(token_ids[:, :-1]), c2i.io[logits])
    packed = packed_pictures(c2i, c2i.io["class_ids"])
    nats = slot_nll(c2i.model, packed.token_ids, slot_targets(packed, c2i.layout.slots), c2i.layout.slots)
    assert close(nats.mean(), c2i.io["loss"])
    assert set(c2i.io["null_class_ids"].tolist()) == {c2i.layout.vocabulary["label"].size - 1}


@pytest.mark.parametrize("executor", ["eager", "packed", "native"])
@pytest.mark.parametrize("name", ["nocfg", "cfg", "interval"])
def test_llamagen_from_labels_draws_as_the_original(golden, monkeypatch, request, name, executor):
    if executor == "native":
        request.getfixturevalue("native_kernels")
    c2i = golden("llamagen_gpt_c2i")
    ids, logits = drawn(monkeypatch, c2i, labelled(c2i, c2i.io["class_ids"]), settings(c2i, name), executor)
    assert torch.equal(ids, c2i.io[f"gen_{name}_ids"])
    assert close(logits, c2i.io[f"gen_{name}_logits"], TOLERANCE if name == "nocfg" else GUIDED_TOLERANCE)


def settings(golden: Golden, name: str) -> SampleConfig:
    if name == "nocfg":
        return NO_GUIDANCE
    if name == "interval":  # the first token, and the loop's 0 .. cfg_interval
        return golden.guidance(guidance_interval=(0, golden.config["generate"]["cfg_interval"] + 2))
    return golden.guidance()


# ---- LlamaGen from captions ----


def captioned(golden: Golden, *, masked: bool = True) -> list[Request]:
    found = []
    for embedding, mask in zip(golden.io["caption_embs"], golden.io["emb_masks"], strict=True):
        features = embedding[mask.bool()] if masked else embedding
        null = Request(order="caption to image", features=golden.model.null_features(len(features)))
        found.append(Request(order="caption to image", features=features, null=null))
    return found


def with_features(golden: Golden, features: torch.Tensor, tokens: torch.Tensor) -> Inputs:
    """One sequence without its last code."""
    n, prefix = len(features), golden.model.config.transformer.prefix_length
    token_ids = torch.cat((torch.full((n,), FEATURE), tokens[:-1]))[None]
    positions = torch.arange(token_ids.shape[1])[None] + prefix - n
    return Inputs(token_ids, positions, features=F.pad(features, (0, 0, 0, len(tokens) - 1))[None])


@torch.no_grad()
def test_llamagen_from_captions_scores_as_the_original(golden):
    t2i = golden("llamagen_gpt_t2i")
    assert close(t2i.model.transformer.table, t2i.io["freqs_cis"], 1e-6)
    requests = captioned(t2i)
    lengths = [len(request.features) for request in requests]
    assert len(set(lengths)) > 1 and min(lengths) < 120  # captions that are filled up there
    for null, name in ((False, "logits"), (True, "logits_uncond")):
        rows = [
            t2i.image_logits(with_features(t2i, (request.null if null else request).features, tokens))[0, n - 1 :]
            for request, tokens, n in zip(requests, t2i.io["tokens"], lengths, strict=True)
        ]
        assert close(torch.stack(rows), t2i.io[name])
        if not null:
            nats = F.cross_entropy(torch.stack(rows).transpose(1, 2), t2i.io["tokens"], reduction="none").mean(1)
            assert close((nats * t2i.io["valid"]).sum() / t2i.io["valid"].sum(), t2i.io["loss"])


@pytest.mark.parametrize("executor", ["eager", "native"])
@pytest.mark.parametrize("name", ["nocfg", "cfg", "interval", "cfg_nomask"])
def test_llamagen_from_captions_draws_as_the_original(golden, monkeypatch, request, name, executor):
    if executor == "native":
        request.getfixturevalue("native_kernels")
    t2i = golden("llamagen_gpt_t2i")
    requests = captioned(t2i, masked=name != "cfg_nomask")
    ids, logits = drawn(monkeypatch, t2i, requests, settings(t2i, name), executor)
    assert torch.equal(ids, t2i.io[f"gen_{name}_ids"])
    assert close(logits, t2i.io[f"gen_{name}_logits"], TOLERANCE if name == "nocfg" else GUIDED_TOLERANCE)


# ---- RAR ----


def rar_ids(rar: Golden, condition_ids: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    start = torch.full_like(condition_ids, rar.layout.vocabulary.special("<start>"))
    return torch.cat((start[:, None], condition_ids[:, None], tokens), dim=1)


@torch.no_grad()
def test_rar_scores_as_the_original(golden):
    rar = golden("rar")
    label = rar.layout.vocabulary["label"]
    assert torch.equal(label.offset + rar.io["class_ids"], rar.io["condition_ids"])
    null = torch.full_like(rar.io["condition_ids"], label.end - 1)
    for condition, name in ((rar.io["condition_ids"], "logits"), (null, "logits_uncond")):
        assert close(rar.image_logits(rar_ids(rar, condition, rar.io["tokens"]))[:, 1:], rar.io[name])


@torch.no_grad()
def test_rar_scores_any_order_as_the_original(golden):
    rar = golden("rar")
    tokens, orders = rar.io["tokens"], rar.io["orders"]
    visited = tokens.gather(1, orders)
    assert torch.equal(visited, rar.io["labels_permuted"])
    none, cells = torch.full((len(tokens), 1), -1), orders + 2
    inputs = Inputs(
        rar_ids(rar, rar.io["condition_ids"], visited),
        positions=torch.cat((torch.tensor([[0, 1]]).expand(len(tokens), -1), cells), dim=1),
        targets=torch.cat((none, cells, none), dim=1),
    )
    assert close(rar.image_logits(inputs)[:, 1:], rar.io["logits_permuted"])


@pytest.mark.parametrize("executor", ["eager", "native"])
@pytest.mark.parametrize("name", ["nocfg", "cfg"])
def test_rar_draws_as_the_original(golden, monkeypatch, request, name, executor):
    if executor == "native":
        request.getfixturevalue("native_kernels")
    rar = golden("rar")
    given = rar.config["generate"]
    guided = SampleConfig(
        temperature=0,
        guidance_scale=given["guidance_scale"],
        guidance_schedule="cosine",
        guidance_power=given["guidance_scale_pow"],
    )
    scales = [guided.guidance_at(step, 16) for step in range(16)]
    assert scales == pytest.approx(rar.io["cfg_scale_per_step"].tolist(), rel=1e-6)
    requests = labelled(rar, rar.io["class_ids"])
    ids, logits = drawn(monkeypatch, rar, requests, guided if name == "cfg" else NO_GUIDANCE, executor)
    assert torch.equal(ids, rar.io[f"gen_{name}_ids"])
    assert close(logits, rar.io[f"gen_{name}_logits"], GUIDED_TOLERANCE)


# ---- what all of them promise ----

SETS = ["llamagen_gpt_c2i", "llamagen_gpt_t2i", "rar"]


def requests_of(golden: Golden) -> list[Request]:
    if "caption_embs" in golden.io:
        return captioned(golden)
    return labelled(golden, golden.io["class_ids"])


@pytest.mark.parametrize("executor", ["eager", "native"])
@pytest.mark.parametrize("name", SETS)
def test_a_request_is_drawn_as_it_is_alone(golden, request, name, executor):
    """Guided ones and others, one after the other joining, with captions of several lengths."""
    if executor == "native":
        request.getfixturevalue("native_kernels")
    found = golden(name)
    requests = requests_of(found)
    jobs = [
        (request, SampleConfig(guidance_scale=scale)) for scale in (1.0, 2.5) for request in (*requests, requests[0])
    ]
    engine = Engine(found.model, found.layout, capacity=5, executor=executor)
    tickets = []
    for request, config in jobs:
        tickets.append(engine.submit(request, config))
        engine.step()
    engine.run()
    for ticket, (request, config) in zip(tickets, jobs, strict=True):
        together = engine.take(ticket)
        (alone,) = generate(found.model, found.layout, [request], config, executor=executor)
        assert torch.equal(together.token_ids, alone.token_ids)
        tolerance = 0 if executor == "native" else 1e-4
        assert torch.allclose(together.log_probs, alone.log_probs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", SETS)
def test_a_beam_of_one_is_greedy_and_candidates_share_their_prompt(golden, name):
    found = golden(name)
    requests = requests_of(found)[:2]
    greedy = generate(found.model, found.layout, requests, NO_GUIDANCE)
    beams = beam_search(found.model, found.layout, requests, 1)
    assert [beam[0].token_ids.tolist() for beam in beams] == [one.token_ids.tolist() for one in greedy]
    likely = beam_search(found.model, found.layout, requests, 3)
    assert all(beam[0].log_prob >= one.log_prob - 1e-4 for beam, one in zip(likely, greedy, strict=True))
    for candidates in best_of(found.model, found.layout, requests, 3):
        assert len({tuple(one.token_ids.tolist()) for one in candidates}) == 3
        assert candidates[0].log_prob == max(one.log_prob for one in candidates)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llamagen_gpt_c2i", "rar"])
def test_nats_are_the_sum_over_decode_steps(golden, name):
    found = golden(name)
    (one,) = generate(found.model, found.layout, labelled(found, found.io["class_ids"][:1]), executor="eager")
    spans = {key: SpanValues(value[None], torch.tensor([len(value)])) for key, value in one.spans.items()}
    packed = found.layout.pack(one.order, spans)
    nll = token_nll(found.model, packed, found.layout.slots)
    assert close(-nll.sum(), one.log_probs.sum(), 1e-3)


@pytest.mark.parametrize("name", SETS)
def test_executors_say_what_they_do_not_know(golden, name):
    found = golden(name)
    reasons = {
        "llamagen_gpt_t2i": "it reads token ids, no features",
        "rar": r"decoder-only models .* not RAR",
    }
    for executor in ("packed", "cuda_graph"):
        if name in reasons:
            with pytest.raises(InputError, match=reasons[name]):
                make_executor(found.model, executor)
    chosen = make_executor(found.model, num_steps=1).name
    assert chosen in ("native", "eager" if name in reasons else "packed")


@pytest.mark.parametrize("name", SETS)
def test_what_does_not_fit_is_refused_by_name(golden, name):
    found = golden(name)
    other = golden(SETS[SETS.index(name) - 1])
    with pytest.raises(ValueError, match=r"a RAR reads|features; the model reads|have up to \d+ tokens"):
        Engine(found.model, other.layout)
    engine = Engine(found.model, found.layout, executor="eager")
    if name == "llamagen_gpt_t2i":
        order = "caption to image"
        with pytest.raises(ValueError, match=r"begins with features: give Request\.features"):
            engine.submit(Request(order=order))
        with pytest.raises(ValueError, match="the features are 7 wide; the model reads 20"):
            engine.submit(Request(order=order, features=torch.zeros(3, 7)))
        with pytest.raises(ValueError, match=r"have shape \(121, 20\); the layout takes 1 to 120 vectors"):
            engine.submit(Request(order=order, features=torch.zeros(121, 20)))
    else:
        with pytest.raises(ValueError, match="features are given, but order"):
            engine.submit(
                Request(order="label to image", given={"label": torch.tensor([1])}, features=torch.zeros(3, 7))
            )


@pytest.mark.parametrize("name", SETS)
def test_an_import_misses_nothing(golden, shared_dir, name):
    folder = shared_dir / "golden" / name
    config = json.loads((folder / "config.json").read_text())
    state = torch.load(next(folder.glob("weights.*")), weights_only=True)
    state, read = (state, read_rar) if name == "rar" else (state["model"], read_llamagen)
    for key in (next(iter(state)), list(state)[-1]):
        with pytest.raises(InputError, match=f"missing: {key}"):
            read({other: tensor for other, tensor in state.items() if other != key}, config)
    with pytest.raises(InputError, match=r"unexpected: more \[3\]"):
        read(state | {"more": torch.zeros(3)}, config)
    report = read(dict(state), config)[-1]
    assert {moved.foreign_key for moved in report.moved} == set(state)
    assert all(before != after for before, after in pairwise(report.moved))


# ---- layouts and models that do not go together; a RAR of its own ----


def test_features_and_open_prefixes_are_refused_where_they_would_be_misread():
    vocabulary = Vocabulary({"special": ["<start>", "<end>"], "text": 5, "image": 7, FEATURES: 0})
    shape = {"num_layers": 1, "d_model": 8, "num_heads": 2, "d_ff": 8}
    flat = TransformerConfig(**shape, max_length=9, positions="rotary_2d", grid=(2, 2), prefix_length=5)
    behind = Layout.parse(vocabulary, {"a": "text{..4} <start> image{4}"})
    with pytest.raises(ValueError, match=r"text\{\.\.4\} <start> before it has an open length"):
        new_model(behind, flat)
    before = Layout.parse(vocabulary, {"a": "<start> image{4} text{..2} <end>"})
    assert new_model(before, flat).config.head_ranges == ((1, 14),)  # the picture's place is fixed
    features = Layout.parse(vocabulary, {"a": f"{FEATURES}{{5}} image{{4}}"})
    assert features.max_length == 9
    with pytest.raises(ValueError, match="has 5 features; the model reads 0"):
        new_model(features, flat)
    model = new_model(features, flat, feature_width=3)
    assert DecoderOnlyConfig.from_dict(json.loads(json.dumps(model.config.to_dict()))) == model.config
    with pytest.raises(ValueError, match="features need at least 1 channel and a prefix of at least 1"):
        new_model(features, replace(flat, prefix_length=0, grid=(3, 3)), feature_width=3)
    with pytest.raises(ValueError, match="begins with features, which cannot be packed"):
        features.pack(
            "a",
            {"image": SpanValues(torch.zeros(1, 4).long(), torch.tensor([4]))}
            | {FEATURES: SpanValues(torch.zeros(1, 0).long(), torch.tensor([0]))},
        )
    for wrong in (f"<start> {FEATURES}{{5}} image{{4}}", f"{FEATURES}{{..5}} <start> image{{4}}"):
        with pytest.raises(ValueError, match="stands first and is not ended by a marker"):
            Layout.parse(vocabulary, {"a": wrong})
    with pytest.raises(ValueError, match="features are not ids, so it is 0"):
        Vocabulary({FEATURES: 3})
    with pytest.raises(ValueError, match="this model reads token ids alone"):
        new_model(before, flat).hidden(Inputs(torch.zeros(1, 2).long(), features=torch.zeros(1, 2, 3)))


RAR_SIZES = RARConfig(codebook_size=7, num_classes=3, num_codes=4, num_layers=2, d_model=12, num_heads=3, d_ff=16)


def test_a_rar_begins_as_the_identity_and_every_parameter_learns():
    torch.manual_seed(0)
    model = RAR(RAR_SIZES).eval()
    token_ids = torch.tensor([[7, 8, 0, 3, 6, 2], [7, 11, 1, 1, 5, 4]])
    again = token_ids.clone()
    again[:, 2] = 2
    assert torch.equal(model.hidden(token_ids)[:, 3], model.hidden(again)[:, 3])  # attention is still weighted by 0
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    assert not torch.allclose(model.hidden(token_ids)[:, 3], model.hidden(again)[:, 3])
    slots = RAR_SIZES.layout.slots
    spans = {"label": SpanValues(token_ids[:, 1:2] - 8, torch.ones(2).long())}
    spans["image"] = SpanValues(token_ids[:, 2:], torch.full((2,), 4))
    packed = RAR_SIZES.layout.pack("label to image", spans)
    assert torch.equal(packed.token_ids, token_ids)
    targets = slot_targets(packed, slots)
    slot_nll(model, packed.token_ids, targets, slots).sum().backward()
    assert all(bool((parameter.grad != 0).any()) for parameter in model.parameters())


@pytest.mark.parametrize(("name", "millions"), [("rar-b", 261), ("rar-l", 461), ("rar-xl", 955), ("rar-xxl", 1499)])
def test_rars_have_the_published_parameter_counts(name, millions):
    with torch.device("meta"):
        model = RAR(PRESETS[name])
    unread = (2 * 1022 + 98 + 1) * model.config.d_model  # rows of positions and steps that no picture reaches, one id
    assert (model.num_parameters + unread) / 1e6 == pytest.approx(millions, abs=0.7)


@pytest.mark.parametrize(("name", "expected"), [("llamagen-xl", 777_678_080)])
def test_llamagen_from_captions_has_the_published_parameter_count(name, expected):
    layout = Layout.parse(Vocabulary({FEATURES: 0, "image": 16384}), {"caption to image": "features{120} image{256}"})
    shape = TransformerConfig(max_length=376, grid=(16, 16), prefix_length=120, **transformer_config.PRESETS[name])
    with torch.device("meta"):
        assert new_model(layout, shape, feature_width=2048).num_parameters == expected


def test_a_rar_cannot_be_of_any_size():
    with pytest.raises(ValueError, match="num_codes is 0; it must be at least 1"):
        replace(RAR_SIZES, num_codes=0)
    with pytest.raises(ValueError, match="d_model 12 is not divisible by num_heads 5"):
        replace(RAR_SIZES, num_heads=5)
    model = RAR(RAR_SIZES)
    with pytest.raises(ValueError, match=r"a RAR reads 2 \(start, label\) to 6"):
        model.hidden(torch.zeros(1, 7, dtype=torch.long))
    with pytest.raises(ValueError, match="begins with the start token and its label together"):
        model.extend(model.new_state(1), [0], torch.tensor([[7]]))
    with pytest.raises(ValueError, match=r"scores codes alone, ids 0\.\.6"):
        model.logits(torch.zeros(1, 12), Slot(((6, 8),)))
    logits = model.logits(torch.zeros(1, 12))
    assert logits.shape == (1, 12) and bool((logits[:, 7:] == -torch.inf).all())
    assert bool(torch.isfinite(logits[:, :7]).all())


@pytest.mark.parametrize(("codes", "scale"), [(1024, 15.5), (16384, 1.0)])
def test_vfmtok_rar_is_a_rar_without_the_published_guidance(codes, scale):
    shapes = {
        "embeddings.weight": (codes + 1002, 1024),
        "lm_head.weight": (codes, 1024),
        "timesteps_embeddings": (1, 356, 1024),
        "blocks.0.attn.q_norm.weight": (64,),
        "blocks.0.mlp.fc1.weight": (4096, 1024),
        **{f"blocks.{layer}.adaLN_modulation.1.weight": (6144, 1024) for layer in range(24)},
    }
    found = rar.infer_config({key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
    config = rar.read_config(found)
    assert (config.codebook_size, config.num_classes, config.num_codes) == (codes, 1000, 256)
    assert rar.read_sampling(found).guidance_scale == scale
