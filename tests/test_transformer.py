"""The transformer against plain formulas, forward and gradient; cached decoding against one full pass.

The oracle at the top is written from the papers' formulas with loops and complex numbers, and shares with the
library nothing but the parameters.
"""

import json
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from noticing import fails_at
from torch import Tensor

from smalti.models.config import PRESETS, TransformerConfig
from smalti.models.decode_state import DecodeState, Places
from smalti.models.decoder_only import DecoderOnly, DecoderOnlyConfig
from smalti.models.transformer import Norm, Transformer, rotary_table, rotary_table_2d, rotate, sinusoids

B, T, S = 3, 7, 5


def config(**options) -> TransformerConfig:
    return TransformerConfig(**(dict(num_layers=2, d_model=20, num_heads=5, d_ff=23, max_length=11) | options))


CONFIGS = {
    "gpt-2": config(),
    "gelu_tanh, sinusoidal, odd width": config(
        feed_forward="gelu_tanh", positions="sinusoidal", d_model=21, num_heads=3
    ),
    "relu, no positions": config(feed_forward="relu", positions="none"),
    "tanh, both ways": config(feed_forward="tanh", causal=False),
    "llama, grouped heads": config(
        d_model=24, num_heads=6, num_kv_heads=2, norm="rms", feed_forward="swiglu", bias=False, positions="rotary"
    ),
    "one key-value head": config(num_kv_heads=1, positions="rotary", rotary_base=500.0, norm_eps=1e-6),
    "llamagen": config(
        norm="rms", feed_forward="swiglu", bias=False, positions="rotary_2d", grid=(3, 3), prefix_length=2
    ),
    "llamagen, released": config(positions="rotary_2d", grid=(2, 5), prefix_length=1, zero_prefix_rotation=True),
    "qk_norm, layer": config(qk_norm=True, positions="rotary"),
    "qk_norm, rms, grouped": config(
        qk_norm=True, norm="rms", positions="rotary", d_model=24, num_heads=6, num_kv_heads=3
    ),
    "decoder with context": config(cross_attention=True, positions="sinusoidal"),
    "wide heads, grouped": config(
        d_model=22, num_heads=6, num_kv_heads=2, head_width=8, norm="rms", feed_forward="swiglu", positions="rotary"
    ),
    "narrow heads, context": config(head_width=3, cross_attention=True),
}
CAUSAL = {name: c for name, c in CONFIGS.items() if c.causal}
every_config = pytest.mark.parametrize("config_", CONFIGS.values(), ids=CONFIGS)
every_causal_config = pytest.mark.parametrize("config_", CAUSAL.values(), ids=CAUSAL)


def new(config_: TransformerConfig, seed: int = 0) -> Transformer:
    """A transformer in float64 whose every parameter, norms and biases included, is random and large."""
    torch.manual_seed(seed)
    model = Transformer(config_).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def inputs(config_: TransformerConfig, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    given = {"x": torch.randn(B, T, config_.d_model, generator=generator, dtype=torch.float64)}
    if config_.cross_attention:
        given["context"] = torch.randn(B, S, config_.d_model, generator=generator, dtype=torch.float64)
        given["context_mask"] = torch.arange(S) < torch.tensor([[5], [1], [3]])
    return given


def run(model: Transformer, x: Tensor, context: Tensor | None = None, context_mask: Tensor | None = None) -> Tensor:
    return model(x, context=None if context is None else model.context(context, context_mask))


def plain_norm(norm: Norm, x: Tensor) -> Tensor:
    if norm.kind == "rms":
        return x / (x.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x / 2 * (1 + ((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)).tanh()),
    "relu": lambda x: x.clamp(min=0),
    "tanh": lambda x: 1 - 2 / ((2 * x).exp() + 1),
}


def plain_linear(layer: torch.nn.Linear, x: Tensor) -> Tensor:
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def plain_feed_forward(layer, x: Tensor) -> Tensor:
    x = plain_linear(layer.up, x)
    if layer.kind != "swiglu":
        return plain_linear(layer.down, ACTIVATIONS[layer.kind](x))
    gate, up = x[..., : layer.down.in_features], x[..., layer.down.in_features :]
    return plain_linear(layer.down, gate / (1 + (-gate).exp()) * up)


def turns(config_: TransformerConfig, position: int) -> Tensor:
    """What each channel pair is multiplied by at a position: e^(i·angle), in the float32 the tables are kept in."""
    pairs = config_.head_dim // 2
    if config_.positions == "rotary":
        angles = [position * config_.rotary_base ** (-2 * j / config_.head_dim) for j in range(pairs)]
    elif position < config_.prefix_length:
        return torch.full((pairs,), 0 if config_.zero_prefix_rotation else 1, dtype=torch.complex128)
    else:
        row, column = divmod(position - config_.prefix_length, config_.grid[1])
        thetas = [config_.rotary_base ** (-2 * j / pairs) for j in range(pairs // 2)]
        angles = [row * theta for theta in thetas] + [column * theta for theta in thetas]
    return torch.tensor([complex(np.float32(math.cos(a)), np.float32(math.sin(a))) for a in angles])


def plain_rotation(config_: TransformerConfig, x: Tensor, position: int) -> Tensor:
    if "rotary" not in config_.positions:
        return x
    turned = torch.complex(x[0::2], x[1::2]) * turns(config_, position)
    return torch.stack((turned.real, turned.imag), dim=-1).flatten()


def plain_softmax_average(scores: list[Tensor], values: list[Tensor]) -> Tensor:
    weights = (torch.stack(scores) - torch.stack(scores).detach().max()).exp()
    return (weights[:, None] * torch.stack(values)).sum(0) / weights.sum()


def plain_attention(layer, config_: TransformerConfig, x: Tensor) -> Tensor:
    """One sequence, one head, one query after the other."""
    Dh = config_.head_dim
    D = config_.num_heads * Dh
    qkv = plain_linear(layer.qkv, x)
    heads = []
    for head in range(config_.num_heads):
        shared = head // (config_.num_heads // config_.kv_heads)
        q = qkv[:, head * Dh : (head + 1) * Dh]
        k = qkv[:, D + shared * Dh : D + (shared + 1) * Dh]
        v = qkv[:, D + (config_.kv_heads + shared) * Dh : D + (config_.kv_heads + shared + 1) * Dh]
        if config_.qk_norm:
            q, k = plain_norm(layer.q_norm, q), plain_norm(layer.k_norm, k)
        q = [plain_rotation(config_, q[t], t) for t in range(len(x))]
        k = [plain_rotation(config_, k[t], t) for t in range(len(x))]
        rows = []
        for t in range(len(x)):
            seen = range(t + 1) if config_.causal else range(len(x))
            rows.append(plain_softmax_average([q[t] @ k[s] / math.sqrt(Dh) for s in seen], [v[s] for s in seen]))
        heads.append(torch.stack(rows))
    return plain_linear(layer.out, torch.cat(heads, dim=-1))


def plain_cross_attention(layer, config_: TransformerConfig, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
    Dh = config_.head_dim
    D = config_.num_heads * Dh
    q, kv = plain_linear(layer.q, x), plain_linear(layer.kv, context[mask])
    heads = []
    for head in range(config_.num_heads):
        own = slice(head * Dh, (head + 1) * Dh)
        k, v = kv[:, :D][:, own], kv[:, D:][:, own]
        rows = [plain_softmax_average([row @ key / math.sqrt(Dh) for key in k], list(v)) for row in q[:, own]]
        heads.append(torch.stack(rows))
    return plain_linear(layer.out, torch.cat(heads, dim=-1))


def plain_positions(model: Transformer, length: int) -> Tensor:
    D = model.config.d_model
    if model.config.positions == "learned":
        return model.positions.weight[:length]
    if model.config.positions != "sinusoidal":
        return torch.zeros(length, D, dtype=torch.float64)
    half = (D + 1) // 2
    rows = [
        [math.sin(p / 10000 ** (j / half)) for j in range(half)]
        + [math.cos(p / 10000 ** (j / half)) for j in range(half)]
        for p in range(length)
    ]
    return torch.tensor(rows)[:, :D].double()


def plain_transformer(model: Transformer, x: Tensor, context: Tensor | None = None, context_mask=None) -> Tensor:
    outputs = []
    for b in range(len(x)):
        h = x[b] + plain_positions(model, x.shape[1])
        for block in model.blocks:
            h = h + plain_attention(block.attention, model.config, plain_norm(block.attention_norm, h))
            if context is not None:
                normed = plain_norm(block.cross_norm, h)
                mask = torch.ones(S, dtype=torch.bool) if context_mask is None else context_mask[b]
                h = h + plain_cross_attention(block.cross_attention, model.config, normed, context[b], mask)
            h = h + plain_feed_forward(block.feed_forward, plain_norm(block.feed_forward_norm, h))
        outputs.append(plain_norm(model.norm, h))
    return torch.stack(outputs)


def check_formulas(config_: TransformerConfig) -> None:
    """Hidden states, and the gradients of a random projection of them by inputs and every parameter."""
    model, given = new(config_), inputs(config_)
    wanted = [given["x"].requires_grad_(), *model.parameters()]
    if "context" in given:
        wanted.append(given["context"].requires_grad_())
    projection = torch.randn(B, T, config_.d_model, dtype=torch.float64)
    found, expected = run(model, **given), plain_transformer(model, **given)
    assert torch.allclose(found, expected, rtol=0, atol=1e-9)
    gradients = torch.autograd.grad((found * projection).sum(), wanted)
    expected_gradients = torch.autograd.grad((expected * projection).sum(), wanted)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert torch.allclose(gradient, expected_gradient, rtol=1e-9, atol=1e-9)


@every_config
def test_forward_and_gradient_follow_the_formulas(config_):
    check_formulas(config_)


def test_a_context_without_a_mask_is_all_real():
    model, given = new(config(cross_attention=True)), inputs(config(cross_attention=True))
    found = run(model, given["x"], given["context"])
    assert torch.allclose(found, plain_transformer(model, given["x"], given["context"]), atol=1e-9)


def test_a_context_that_is_all_padding_gives_finite_numbers():
    model, given = new(config(cross_attention=True)), inputs(config(cross_attention=True))
    given["context_mask"][1] = False
    given["context"].requires_grad_()
    hidden = run(model, **given)
    hidden.sum().backward()
    assert bool(hidden.isfinite().all())
    assert bool(given["context"].grad.isfinite().all())
    assert bool((given["context"].grad[1] == 0).all())


def test_a_mask_replaces_the_causal_one():
    model, x = new(config()), inputs(config())["x"]
    everything = torch.ones(B, 1, T, T, dtype=torch.bool)
    assert torch.allclose(model(x, mask=everything.tril()), model(x), atol=1e-12)
    both_ways = Transformer(replace(config(), causal=False)).double().eval()
    both_ways.load_state_dict(model.state_dict())
    assert torch.allclose(model(x, mask=everything), both_ways(x), atol=1e-12)


@every_causal_config
def test_what_predicts_a_token_does_not_see_it_or_what_follows(config_):
    """The hidden state at t predicts token t + 1: its gradient by the inputs from t + 1 on is exactly 0."""
    model, given = new(config_), inputs(config_)
    given["x"].requires_grad_()
    hidden = run(model, **given)
    for t in range(T):
        (gradient,) = torch.autograd.grad(hidden[:, t].sin().sum(), given["x"], retain_graph=True)
        assert bool((gradient[:, t + 1 :] == 0).all())
        seen = gradient[:, : t + 1].abs().amax(-1)
        assert bool((seen > 0).all())


CHUNKS = ([1] * T, [T], [3, 1, 1, 2], [1, 4, 2])


def cached(model: Transformer, x: Tensor, chunks, context: Tensor | None = None, context_mask=None) -> Tensor:
    state, rows = DecodeState(model.config, len(x), x.shape[1], dtype=x.dtype), slice(0, len(x))
    context_ = None if context is None else model.context(context, context_mask)
    outputs = [model.extend(part, state, rows, context=context_) for part in x.split(list(chunks), dim=1)]
    return torch.cat(outputs, dim=1)


@torch.no_grad()
def check_cache(config_: TransformerConfig) -> None:
    """In any chunks, decoding with the keys and values so far gives the hidden states of one full pass."""
    model, given = new(config_), inputs(config_)
    full = run(model, **given)
    for chunks in CHUNKS:
        found = cached(model, chunks=chunks, **given)
        assert torch.allclose(found, full, rtol=0, atol=1e-10)


@torch.no_grad()
def check_ragged(config_: TransformerConfig) -> None:
    """Rows that get tokens at their own times, in rows that held others before, are what they are alone."""
    model, given = new(config_), inputs(config_)
    full = run(model, **given)
    state = DecodeState(config_, B + 1, T, dtype=torch.float64)
    for both in state.both:
        both += 1e3  # what was there before
    seen = [0] * B
    for counts in ([2, 1, 3], [1, 3, 0], [1, 1, 1], [0, 2, 1], [3, 0, 2]):
        going = [row for row in range(B) if counts[row]]
        own = [given["x"][row, seen[row] : seen[row] + counts[row]] for row in going]
        x = torch.nn.utils.rnn.pad_sequence(own, batch_first=True, padding_value=-7.0)
        context = None
        if "context" in given:
            context = model.context(given["context"][going], given["context_mask"][going])
        rows = slice(1, B + 1) if len(going) == B else [row + 1 for row in going]
        found = model.extend(x, state, rows, [counts[row] for row in going], context)
        assert bool(found.isfinite().all())
        for i, row in enumerate(going):
            expected = full[row, seen[row] : seen[row] + counts[row]]
            assert torch.allclose(found[i, : counts[row]], expected, rtol=0, atol=1e-10)
            seen[row] += counts[row]
    assert seen == [T] * B


@every_causal_config
def test_cached_decoding_equals_the_full_pass(config_):
    check_cache(config_)


@every_causal_config
def test_rows_have_their_own_lengths(config_):
    check_ragged(config_)


@torch.no_grad()
def test_rows_are_copied_and_cleared():
    model, x = new(config(positions="rotary")), inputs(config())["x"]
    state, every = DecodeState(model.config, B, T, dtype=x.dtype), slice(0, B)
    model.extend(x[:, :4], state, every, [4, 2, 3])
    whole = model(torch.cat((x[2:, :3], x[2:, 4:5]), dim=1))[:, -1]
    state.copy([2, 2], [0, 1])
    assert state.lengths == [3, 3, 3]
    found = model.extend(x[2:, 4:5].expand(B, -1, -1), state, every)
    assert torch.allclose(found[:, 0], whole.expand(B, -1), atol=1e-12)
    state.clear(1)
    assert state.lengths == [4, 0, 4] and all(bool((both[:, 1] == 0).all()) for both in state.both)


def test_context_needs_cross_attention():
    with pytest.raises(ValueError, match="has no cross-attention"):
        new(config()).context(torch.zeros(1, S, 20))


def test_plain_attention_needs_no_mask():
    state = DecodeState(config(), 2, 7)
    assert Places(state, slice(0, 2), 5).mask() is None
    state.advance(slice(0, 2), 2)
    assert Places(state, slice(0, 2), 1).mask() is None
    assert Places(state, [1], 2).mask().tolist() == [[True, True, True, False], [True] * 4]
    state.advance([1], 1)
    assert Places(state, slice(0, 2), 1).mask().tolist() == [[[[True, True, True, False]]], [[[True] * 4]]]


def check_rotation_of_the_prefix(config_: TransformerConfig) -> None:
    """Rotation keeps every query's length, and where the prefix looks depends on what is there."""
    table = new(config_).table.double()
    x = torch.randn(2, 5, len(table), config_.head_dim, dtype=torch.float64)
    assert torch.allclose(rotate(x, table).norm(dim=-1), x.norm(dim=-1), rtol=1e-6)
    prefix = config_.prefix_length
    turned = rotate(x, table)
    scores = turned[:, :, -1:] @ turned[:, :, :prefix].transpose(-1, -2)
    assert bool((scores.std(-1) > 1e-3).all())


LLAMAGEN = config(positions="rotary_2d", grid=(2, 4), prefix_length=3)


def test_rotation_keeps_lengths_also_in_the_prefix():
    check_rotation_of_the_prefix(LLAMAGEN)
    fails_at(
        "assert torch.allclose(rotate(x, table).norm(dim=-1), x.norm(dim=-1), rtol=1e-6)",
        check_rotation_of_the_prefix,
        replace(LLAMAGEN, zero_prefix_rotation=True),
    )


def test_rotary_scores_depend_on_distance_alone():
    table = rotary_table(64, 10, 10000.0).double()
    q, k = torch.randn(2, 1, 1, 1, 10, dtype=torch.float64)
    scores = [(rotate(q, table[t : t + 1]) * rotate(k, table[t - 7 : t - 6])).sum().item() for t in range(7, 64)]
    assert scores == pytest.approx([scores[0]] * 57, abs=1e-5)


@pytest.mark.parametrize("name", ["llamagen_gpt_c2i", "llamagen_gpt_t2i"])
def test_the_2d_table_is_llamagens(shared_dir, name):
    folder = shared_dir / "golden" / name
    peer = json.loads((folder / "config.json").read_text())["ModelArgs"]
    prefix, cells = peer["cls_token_num"], peer["block_size"]
    expected = torch.from_numpy(np.load(folder / "io.npz")["freqs_cis"])
    config_ = TransformerConfig(
        num_layers=1,
        d_model=peer["dim"],
        num_heads=peer["n_head"],
        d_ff=8,
        max_length=prefix + cells,
        positions="rotary_2d",
        rotary_base=peer["rope_base"],
        grid=(math.isqrt(cells), math.isqrt(cells)),
        prefix_length=prefix,
        zero_prefix_rotation=True,
    )
    assert torch.allclose(rotary_table_2d(config_), expected, rtol=0, atol=1e-6)
    ours = rotary_table_2d(replace(config_, zero_prefix_rotation=False))
    assert torch.equal(ours[prefix:], rotary_table_2d(config_)[prefix:])
    assert torch.equal(ours[:prefix], torch.tensor([1.0, 0.0]).expand_as(ours[:prefix]))


def test_low_precision_rotates_and_norms_in_float32():
    x = torch.randn(2, 3, 5, 8).bfloat16()
    table = rotary_table(5, 8, 10000.0)
    assert torch.equal(rotate(x, table), rotate(x.float(), table).bfloat16())
    norm = Norm("rms", 8, 1e-5)
    assert torch.equal(norm.bfloat16()(x), Norm("rms", 8, 1e-5)(x.float()).bfloat16())


def test_sinusoids_by_hand():
    table = sinusoids(3, 4)
    expected = [[math.sin(p), math.sin(p / 100), math.cos(p), math.cos(p / 100)] for p in range(3)]
    assert table.flatten().tolist() == pytest.approx([value for row in expected for value in row], abs=1e-7)


@every_config
def test_every_parameter_gets_a_gradient(config_):
    model = Transformer(config_)  # as it is initialised
    given = {name: value.float() if value.is_floating_point() else value for name, value in inputs(config_).items()}
    run(model, **given).sin().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name


@pytest.mark.parametrize("kind", ["dropout", "attention_dropout"])
def test_dropout_acts_in_training_alone(kind):
    plain = new(config(cross_attention=True))
    dropped = Transformer(config(cross_attention=True, **{kind: 0.5})).double()
    dropped.load_state_dict(plain.state_dict())
    given = inputs(plain.config)
    expected = run(plain, **given)
    assert torch.equal(run(plain.train(), **given), expected)  # training alone changes nothing
    assert torch.equal(run(dropped.eval(), **given), expected)
    torch.manual_seed(0)
    first, second = run(dropped.train(), **given), run(dropped, **given)
    assert not torch.allclose(first, expected)
    assert not torch.allclose(first, second)


def test_dropout_keeps_the_mean():
    model = Transformer(config(num_layers=1, dropout=0.3)).double().train()
    torch.nn.init.zeros_(model.blocks[0].attention.out.weight)
    seen = []
    model.blocks[0].attention_norm.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    x = torch.ones(2000, T, 20, dtype=torch.float64)
    model(x)
    expected = x[0] + model.positions.weight[:T]
    assert torch.allclose(seen[0].mean(0), expected, rtol=0, atol=0.12)
    assert float((seen[0] == 0).double().mean()) == pytest.approx(0.3, abs=0.01)


def test_weights_start_as_in_gpt_2():
    torch.manual_seed(0)
    model = Transformer(config(num_layers=8, d_model=60, d_ff=90, cross_attention=True))
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert bool((parameter == 1).all())
        elif name.endswith("bias"):
            assert bool((parameter == 0).all())
        else:
            residual = name.endswith(("out.weight", "down.weight"))
            expected = 0.02 / math.sqrt(16) if residual else 0.02
            assert float(parameter.detach().std()) == pytest.approx(expected, rel=0.1), name


LLAMAGEN_SIZES = {
    "B": (12, 12, 768, 2048, 110_888_448),
    "L": (24, 16, 1024, 2816, 342_910_976),
    "XL": (36, 20, 1280, 3584, 774_699_520),
    "3B": (24, 32, 3200, 8704, 3_096_659_200),
    "7B": (32, 32, 4096, 11008, 6_614_589_440),
}


@pytest.mark.parametrize("sizes", LLAMAGEN_SIZES.values(), ids=LLAMAGEN_SIZES)
def test_parameter_counts_are_llamagens(sizes):
    layers, heads, d_model, d_ff, expected = sizes
    with torch.device("meta"):
        model = Transformer(
            TransformerConfig(
                num_layers=layers,
                d_model=d_model,
                num_heads=heads,
                d_ff=d_ff,
                max_length=257,
                norm="rms",
                feed_forward="swiglu",
                bias=False,
                positions="rotary_2d",
                grid=(16, 16),
                prefix_length=1,
            )
        )
    classes, embeddings, head = 1001 * d_model, 16384 * d_model, 16384 * d_model
    assert sum(p.numel() for p in model.parameters()) + classes + embeddings + head == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 0}, "num_layers is 0; it must be at least 1"),
        ({"max_length": -1}, "max_length is -1"),
        ({"d_model": 21}, "d_model 21 is not divisible by num_heads 5"),
        ({"head_width": 0}, "head_width is 0; it must be at least 1"),
        ({"positions": "rotary", "head_width": 3}, "rotary positions need an even head width, not 3"),
        ({"num_kv_heads": 2}, "num_heads 5 is not divisible by num_kv_heads 2"),
        ({"num_kv_heads": 0}, "num_kv_heads is 0; it must be at least 1, or None"),
        ({"num_kv_heads": -5}, "num_kv_heads is -5"),
        ({"norm": "batch"}, "norm 'batch' is unknown; choose one of layer, rms"),
        ({"feed_forward": "silu"}, "feed_forward 'silu' is unknown; choose one of gelu, gelu_tanh, relu, tanh, swiglu"),
        ({"positions": "alibi"}, "positions 'alibi' is unknown; choose one of learned"),
        ({"positions": "rotary", "d_model": 15}, "rotary positions need an even head width, not 3"),
        ({"positions": "rotary_2d", "d_model": 30, "grid": (3, 4)}, "head width divisible by 4, not 6"),
        ({"positions": "rotary_2d"}, r"need grid=\(rows, columns\)"),
        ({"positions": "rotary_2d", "grid": (2, 5)}, r"prefix_length \+ the grid's cells, 0 \+ 2 × 5 = 10"),
        ({"positions": "rotary_2d", "grid": (-3, -4)}, r"grid is \(-3, -4\) and prefix_length 0; expected at least 1"),
        ({"positions": "rotary_2d", "grid": (4, 4), "prefix_length": -1}, "prefix_length -1; .* no negative prefix"),
        ({"dropout": 1.0}, r"dropout is 1\.0; expected a share in \[0, 1\)"),
        ({"attention_dropout": -0.1}, r"attention_dropout is -0\.1"),
    ],
)
def test_a_config_that_cannot_be_is_explained(options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_too_many_tokens_are_refused():
    model = new(config(max_length=T))
    x = torch.randn(1, T + 1, 20, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"8 tokens exceed the limit of 7 \(max_length\)"):
        model(x)
    for room in (T, 50):  # more room gives no more positions
        state = DecodeState(model.config, 1, room, dtype=x.dtype)
        model.extend(x[:, :T], state, [0])
        with pytest.raises(ValueError, match="8 tokens exceed the limit of 7"):
            model.extend(x[:, T:], state, [0])
    with pytest.raises(ValueError, match="6 tokens exceed the limit of 5"):
        model.extend(x[:, :6], DecodeState(model.config, 1, 5, dtype=x.dtype), [0])


# Known defects of other projects, put in on purpose: each check above must notice its own.

GROUPED = CONFIGS["llama, grouped heads"]


def test_a_wrong_order_of_shared_heads_is_noticed(monkeypatch):
    attention = torch.nn.functional.scaled_dot_product_attention

    def tiled(q, k, v, *, enable_gqa=False, **options):
        times = q.shape[1] // k.shape[1]
        return attention(q, k.repeat(1, times, 1, 1), v.repeat(1, times, 1, 1), **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", tiled)
    fails_at("assert torch.allclose(found, expected, rtol=0, atol=1e-9)", check_formulas, GROUPED)


def test_a_cache_as_wide_as_the_query_heads_is_noticed(monkeypatch):
    """LlamaGen's cache has room for all heads: grouped keys fill the first ones, the rest stay empty."""
    original, write = DecodeState.__init__, Places.write

    def wide(self, config_, *args, **options):
        original(self, replace(config_, num_kv_heads=None), *args, **options)

    def filling_up(self, layer, keys, values):
        missing = self.state.keys(layer).shape[1] - keys.shape[1]
        fill = (0, 0, 0, 0, 0, missing)
        return write(self, layer, *(torch.nn.functional.pad(new_, fill) for new_ in (keys, values)))

    monkeypatch.setattr(DecodeState, "__init__", wide)
    monkeypatch.setattr(Places, "write", filling_up)
    check_cache(CONFIGS["gpt-2"])
    fails_at("assert torch.allclose(found, full, rtol=0, atol=1e-10)", check_cache, GROUPED)


def test_a_cache_that_holds_one_position_is_noticed(monkeypatch):
    """Torchsmith's cache fills one slot of a buffer and attends to all of it."""
    write = Places.write

    def last(self, layer, keys, values):
        found = write(self, layer, keys, values)
        for held in found:
            held[:, :, : self.past] = 0
        return found

    monkeypatch.setattr(Places, "write", last)
    fails_at("assert torch.allclose(found, full, rtol=0, atol=1e-10)", check_cache, CONFIGS["gpt-2"])


@pytest.mark.parametrize("name", ["gpt-2", "gelu_tanh, sinusoidal, odd width", "llamagen"])
def test_positions_off_by_one_behind_the_prompt_are_noticed(monkeypatch, name):
    forward = Transformer.forward

    def late(self, x, *, places=None, positions=None, **options):
        positions = None if places is None else places.slots + (places.past > 0)
        return forward(self, x, places=places, positions=positions, **options)

    monkeypatch.setattr(Transformer, "forward", late)
    fails_at("assert torch.allclose(found, full, rtol=0, atol=1e-10)", check_cache, CONFIGS[name])


def test_rows_that_share_the_longest_ones_positions_are_noticed(monkeypatch):
    """As where a batch has one length, and its shorter rows are padded."""
    forward = Transformer.forward

    def shared(self, x, *, places=None, positions=None, **options):
        positions = None if places is None else torch.arange(places.width - x.shape[1], places.width)
        return forward(self, x, places=places, positions=positions, **options)

    monkeypatch.setattr(Transformer, "forward", shared)
    check_cache(CONFIGS["gpt-2"])
    fails_at("assert torch.allclose(found[i, : counts[row]], expected", check_ragged, CONFIGS["gpt-2"])


def test_slots_from_before_that_are_looked_at_are_noticed(monkeypatch):
    def everything(self):
        return torch.ones(self.num_tokens, self.width, dtype=torch.bool).tril(self.width - self.num_tokens)

    monkeypatch.setattr(Places, "mask", everything)
    check_cache(CONFIGS["gpt-2"])
    fails_at("assert torch.allclose(found[i, : counts[row]], expected", check_ragged, CONFIGS["gpt-2"])


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
def test_presets_have_the_published_parameter_counts(name, expected):
    with torch.device("meta"):
        transformer = Transformer(TransformerConfig(max_length=257, grid=(16, 16), prefix_length=1, **PRESETS[name]))
    embeddings = (2 * 16384 + 1001) * transformer.config.d_model
    assert sum(parameter.numel() for parameter in transformer.parameters()) + embeddings == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama-5m", 5_110_480),
        ("llama-20m", 21_786_880),
        ("llama-60m", 62_843_392),
        ("llama-130m", 131_033_856),
        ("llama-350m", 344_077_312),
        ("llama-1b", 1_047_799_808),
    ],
)
def test_llama_presets_have_the_parameters_they_are_named_for(name, expected):
    with torch.device("meta"):
        config = DecoderOnlyConfig(vocab_size=30_000, transformer=TransformerConfig(max_length=98, **PRESETS[name]))
        assert DecoderOnly(config).num_parameters == expected
    # By hand: embeddings and head; a layer has four D × D and three D × F matrices and two norms; one norm at the end.
    shape = config.transformer
    D, F = shape.d_model, shape.d_ff
    assert expected == 2 * 30_000 * D + shape.num_layers * (4 * D * D + 3 * D * F + 2 * D) + D
