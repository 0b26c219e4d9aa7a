"""Weights in fewer bits: what is computed with them is what is computed with the numbers they stand for."""

import pytest
import torch
from test_executors import KINDS, LAYOUT, V, layout_model, small_weights, tokens
from test_executors import decoder_only as float_model

from smalti.engine.executors import EXECUTORS, make_executor
from smalti.engine.generate import Request, generate
from smalti.engine.sampling import SampleConfig
from smalti.models.decoder_only import DecoderOnly
from smalti.models.stored_weights import StoredLinear, StoredWeight
from smalti.sequences.layout import Slot

STORED = ("bfloat16", "int8")


@pytest.fixture(params=["native", "eager"])
def executor(request) -> str:
    if request.param == "native":
        request.getfixturevalue("native_kernels")
    return request.param


def expanded(model: DecoderOnly) -> DecoderOnly:
    """A plain model of the numbers that the stored weights stand for."""
    plain = DecoderOnly(model.config).eval()
    values = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("values"):
            module = model.get_submodule(name.removesuffix(".values"))
            assert isinstance(module, StoredWeight)
            whole = module.values.double()
            whole = whole if module.scales is None else whole * module.scales.double()[:, None]
            name = name.replace("stored_head.values", "head").replace("stored.values", "weight")
            values[name] = whole.float()
        elif not name.endswith("scales"):
            values[name] = tensor
    plain.load_state_dict(values)
    return plain


@pytest.mark.parametrize("storage", STORED)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_pass_is_that_of_the_numbers_the_weights_stand_for(kind, storage, executor):
    model, token_ids = small_weights(float_model(torch.float32, **KINDS[kind])), tokens(9)
    model.store_weights(storage)
    plain = expanded(model)
    ours, state = make_executor(model, executor), make_executor(model, executor).new_state(len(token_ids))
    hidden = ours.extend_all(state, slice(0, len(token_ids)), token_ids.tolist())
    expected = plain.hidden(token_ids)
    assert torch.allclose(hidden.view_as(expected), expected, atol=3e-5, rtol=3e-5)
    for slot in (None, Slot(((2, 3), (11, V)))):
        assert torch.allclose(ours.logits(hidden, slot), plain.logits(hidden, slot), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_bfloat16_weights_take_the_very_sums_of_float32_ones(native_kernels):
    """Expanding changes nothing: the same bits as of a float32 model of the rounded weights."""
    model = small_weights(float_model(torch.float32))
    model.store_weights("bfloat16")
    found = []
    for one in (model, expanded(model)):
        executor = make_executor(one, "native")
        state = executor.new_state(5)
        found.append(executor.extend_all(state, slice(0, 5), tokens(9).tolist()))
    assert torch.equal(*found)


def test_how_far_stored_weights_are_off():
    weight = torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    rounded = StoredWeight(weight, "bfloat16").expanded()
    assert torch.equal(rounded, weight.bfloat16().float())
    assert bool(((rounded - weight).abs() <= weight.abs() / 256).all())
    whole = StoredWeight(weight, "int8")
    assert whole.values.dtype == torch.int8 and int(whole.values.abs().max()) == 127
    off = (whole.expanded() - weight).abs()
    assert bool((off <= weight.abs().amax(1, keepdim=True) / 254 * (1 + 1e-5)).all())
    assert torch.equal(whole.expanded()[3], torch.zeros(40))
    assert whole.num_bytes == 50 * 40 + 4 * 50


@pytest.mark.parametrize("storage", STORED)
def test_pictures_do_not_depend_on_the_batch_nor_drafts(storage, native_kernels):
    model = layout_model()
    model.store_weights(storage)
    requests = [Request(order="image to text", seed=seed) for seed in range(17)]
    plain = [one.token_ids.tolist() for one in generate(model, LAYOUT, requests, executor="native")]
    for batch_size, config in ((1, SampleConfig()), (7, SampleConfig(speculative=4, coupling="inverse"))):
        found = generate(model, LAYOUT, requests, config, batch_size=batch_size, executor="native")
        assert [one.token_ids.tolist() for one in found] == plain


def test_what_stored_weights_are_not_for_is_explained(native_kernels):
    model = layout_model()
    model.store_weights("int8")
    assert model.storage == "int8"
    assert all(isinstance(block.attention.qkv, StoredLinear) for block in model.transformer.blocks)
    assert EXECUTORS["native"].why_not(model) == []
    assert EXECUTORS["packed"].why_not(model) == ["it reads weights stored as float32, not as int8"]
    with pytest.raises(ValueError, match="the weights are int8; only those of float32 can be stored as bfloat16"):
        model.store_weights("bfloat16")
    with pytest.raises(ValueError, match="weights 'int4' is unknown; choose one of float32, bfloat16, int8"):
        layout_model().store_weights("int4")
