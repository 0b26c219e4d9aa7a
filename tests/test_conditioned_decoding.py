"""Models with a condition beside their tokens on the native executor, of widths around those of vectors: RAR, whose
label modulates every block, LlamaGen's form that begins with features, and Janus, whose codes pass an MLP."""

import pytest
import torch

from smalti import native
from smalti.engine.engine import Engine
from smalti.engine.executors import choose_executor, make_executor
from smalti.engine.executors import native as native_executor
from smalti.engine.generate import Request, generate
from smalti.engine.sampling import SampleConfig
from smalti.models.config import LLAMAGEN, TransformerConfig
from smalti.models.decoder_only import DecoderOnly, new_model
from smalti.models.janus import Janus, JanusConfig
from smalti.models.rar import RAR, RARConfig
from smalti.models.stored_weights import STORAGES, StoredLinear
from smalti.sequences.layout import Layout, Slot
from smalti.sequences.vocabulary import FEATURE, FEATURES, Vocabulary

pytestmark = pytest.mark.usefixtures("native_kernels")
WIDTHS = [(24, 3, 40), (128, 4, 256), (152, 2, 94)]
CODES, CLASSES, LENGTH = 41, 5, 12
START = CODES
B = 5


def rar(width: int, heads: int, wide: int) -> RAR:
    torch.manual_seed(0)
    sizes = {"num_layers": 3, "d_model": width, "num_heads": heads, "d_ff": wide}
    model = RAR(RARConfig(codebook_size=CODES, num_classes=CLASSES, num_codes=LENGTH, **sizes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.1 if "modulation" in name else 0.3 / width**0.5 if parameter.ndim == 2 else 0.1)
    return model


FEATURED = Layout.parse(Vocabulary({FEATURES: 0, "image": CODES}), {"caption to image": "features{6} image{12}"})


def featured(width: int, heads: int, wide: int) -> DecoderOnly:
    torch.manual_seed(0)
    shape = TransformerConfig(
        num_layers=2, d_model=width, num_heads=heads, d_ff=wide, max_length=18, grid=(3, 4), prefix_length=6, **LLAMAGEN
    )
    return new_model(FEATURED, shape, feature_width=9).eval()


def janus(width: int, heads: int, wide: int) -> Janus:
    torch.manual_seed(0)
    shape = TransformerConfig(
        num_layers=2, d_model=width, num_heads=heads, d_ff=wide, max_length=30, norm="rms", feed_forward="swiglu",
        bias=False, positions="rotary",
    )  # fmt: skip
    sizes = {"text_size": 50, "start_id": 48, "codebook_size": CODES, "code_dim": 5, "num_codes": LENGTH, "max_text": 8}
    model = Janus(JanusConfig(head_width=width + 3, aligner_depth=3, transformer=shape, **sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.7 / parameter.shape[1] ** 0.5)
    return model


def prompted(num: int) -> list[Request]:
    def of(seed: int, ids: list[int], null: Request | None = None) -> Request:
        return Request(order="text to image", given={"text": torch.tensor(ids)}, null=null, seed=seed)

    ids = [[(7 * seed + place) % 47 for place in range(1 + seed % 8)] for seed in range(num)]
    return [of(seed, one, of(seed, [49] * len(one))) for seed, one in enumerate(ids)]


def labelled(num: int) -> list[Request]:
    def of(label: int, seed: int = 0, null: Request | None = None) -> Request:
        return Request(order="label to image", given={"label": torch.tensor([label])}, null=null, seed=seed)

    return [of(seed % CLASSES, seed, of(CLASSES)) for seed in range(num)]


def captioned(model: DecoderOnly, num: int) -> list[Request]:
    """Captions of one to six features, beside nulls of as many."""
    generator, found = torch.Generator().manual_seed(1), []
    for seed in range(num):
        features = torch.randn(1 + seed % 6, 9, generator=generator)
        null = Request(order="caption to image", features=model.null_features(len(features)))
        found.append(Request(order="caption to image", features=features, null=null, seed=seed))
    return found


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("size", WIDTHS)
@torch.no_grad()
def test_every_position_of_a_rar_equals_the_full_forward_pass(size, storage):
    model = rar(*size)
    model.store_weights(storage)
    assert model.storage == storage and isinstance(model.blocks[0].modulation, StoredLinear) == (storage != "float32")
    codes = torch.randint(CODES, (B, LENGTH), generator=torch.Generator().manual_seed(0))
    labels = START + 1 + torch.arange(B) % (CLASSES + 1)
    token_ids = torch.cat((torch.full((B, 1), START), labels[:, None], codes), dim=1)
    expected = model.hidden(token_ids)
    native = make_executor(model, "native")
    state, every = native.new_state(B), slice(0, B)
    found = native.extend_all(state, every, token_ids[:, :4].tolist()).view(B, 4, -1)
    steps = [native.extend(state, every, token_ids[:, at : at + 1].tolist()) for at in range(4, LENGTH + 2)]
    assert torch.allclose(torch.cat((found, torch.stack(steps, dim=1)), dim=1), expected, rtol=0, atol=3e-5)
    for slot in (None, Slot(((3, 17), (20, CODES)))):
        logits = model.logits(expected[:, -1], slot)
        assert torch.allclose(native.logits(steps[-1], slot), logits, rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_rar_begins_with_its_label():
    model = rar(*WIDTHS[0])
    native = make_executor(model, "native")
    for extend in (native.extend, native.extend_all, make_executor(model, "eager").extend):
        with pytest.raises(ValueError, match="begins with the start token and its label together"):
            extend(native.new_state(1), [0], [[START]])
    with pytest.raises(ValueError, match="a RAR scores codes alone"):
        native.logits(torch.zeros(1, WIDTHS[0][0]), Slot(((0, CODES + 1),)))


@pytest.mark.parametrize("size", WIDTHS)
@torch.no_grad()
def test_features_stand_where_they_stand_in_the_plain_model(size):
    model = featured(*size)
    eager, native = (make_executor(model, name) for name in ("eager", "native"))
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(length, 9, generator=generator) for length in (2, 6, 1, 4)]
    found = []
    for executor in (eager, native):
        state = executor.new_state(7)
        rows = [6, 0, 3, 2]
        for row, features in zip(rows, given, strict=True):
            state.begin(row, features)
        # The second in two parts, the last of them with a code behind it.
        prompts = [[FEATURE] * 2, [FEATURE] * 3, [FEATURE, 5, 7], [FEATURE] * 4]
        hidden = [executor.extend_all(state, rows, prompts)]
        hidden.append(executor.extend(state, [0, 6], [[FEATURE, FEATURE, FEATURE, 8], [9, 4]]))
        hidden.append(executor.extend(state, rows, [[1], [2], [3], [4]]))
        found.append(torch.cat(hidden))
    assert torch.allclose(*found, rtol=0, atol=3e-5)
    with pytest.raises(ValueError, match="begins with features"):
        native.extend(native.new_state(1), [0], [[FEATURE]])


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("size", WIDTHS)
@torch.no_grad()
def test_codes_of_a_janus_become_vectors_and_pass_a_head_of_two_layers(size, storage):
    model = janus(*size)
    model.store_weights(storage)
    first, slot = model.config.first_code, Slot(((51, 60), (70, 92)))
    prompts = [[3, 48, 50, first + 2], [50], [7, 8, 50, first, first + CODES - 1]]
    found = []
    for name in ("eager", "native"):
        executor = make_executor(model, name)
        state = executor.new_state(4)
        rows = [2, 0, 3]
        hidden = torch.cat((executor.extend_all(state, rows, prompts), executor.extend(state, [0], [[first + 5]])))
        found.append((hidden, executor.logits(hidden, slot), executor.logits(hidden)))
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=5e-5)
    native = make_executor(model, "native")
    with pytest.raises(IndexError, match="a token id is outside"):
        native.extend(native.new_state(1), [0], [[first + CODES]])
    with pytest.raises(ValueError, match="a Janus scores codes alone"):
        native.logits(found[0][0], Slot(((0, 3),)))


@pytest.mark.parametrize("size", WIDTHS)
@pytest.mark.parametrize("kind", ["rar", "featured", "janus"])
def test_pictures_do_not_depend_on_batch_and_threads_to_the_last_bit(kind, size):
    if kind == "featured":
        model, layout = featured(*size), FEATURED
        requests = captioned(model, 37)
    else:
        model, requests = (rar(*size), labelled(37)) if kind == "rar" else (janus(*size), prompted(37))
        layout = model.config.layout
    config, before, found = SampleConfig(guidance_scale=1.7, temperature=0.9), torch.get_num_threads(), []
    for threads, batch_size in [(1, 37), (2, 37), (1, 1), (2, 7)]:
        torch.set_num_threads(threads)
        drawn = generate(model, layout, requests, config, batch_size=batch_size, executor="native")
        found.append([(one.token_ids.tolist(), one.log_probs.tolist()) for one in drawn])
    torch.set_num_threads(before)
    assert all(other == found[0] for other in found[1:])
    plain = generate(model, layout, requests, config, executor="eager")
    same = [one.token_ids.tolist() == ids for one, (ids, _) in zip(plain, found[0], strict=True)]
    assert sum(same) >= 35  # a uniform number may lie on an edge


def test_candidates_share_a_beginning_and_its_condition():
    model = rar(*WIDTHS[0])
    requests = [request for request in labelled(2) for _ in range(3)]
    found = []
    for executor in ("eager", "native"):
        engine = Engine(model, model.config.layout, capacity=12, executor=executor)
        tickets = [engine.submit(request, SampleConfig(guidance_scale=2.0)) for request in requests]
        engine.run()
        found.append([engine.take(ticket).token_ids.tolist() for ticket in tickets])
    assert found[0] == found[1]


def test_a_large_model_that_nothing_else_makes_faster_compiles_after_fewer_steps(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("SMALTI_NATIVE")
    monkeypatch.setattr(native, "_loaded", {})
    monkeypatch.setattr(native, "_absent", set())
    model = rar(*WIDTHS[0])
    held = sum(parameter.nbytes for parameter in model.parameters())
    monkeypatch.setattr(native_executor, "BYTES_THAT_REPAY_COMPILING", 100 * held)
    layout = model.config.layout
    shape = TransformerConfig(num_layers=1, d_model=24, num_heads=3, d_ff=40, max_length=layout.max_length)
    found = [choose_executor(new_model(layout, shape).eval(), 999), *(choose_executor(model, n) for n in (99, 100))]
    assert found == ["packed", "eager", "native"]
