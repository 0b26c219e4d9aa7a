"""One device policy: what "auto" is, no device that is written into a step, and no waiting for it within one."""

from contextlib import nullcontext

import pytest
import torch
from test_generate import DIGITS, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from smalti import devices
from smalti.bundle import Bundle
from smalti.cli.app import run
from smalti.devices import choose_device, choose_dtype
from smalti.engine.engine import Engine
from smalti.engine.sampling import SampleConfig, guide, sample
from smalti.image_tokenizers import quantizer
from smalti.image_tokenizers.titok import TiTok, TiTokConfig
from smalti.image_tokenizers.vit_vqgan import ViTVQGAN, ViTVQGANConfig
from smalti.image_tokenizers.vqgan import VQGAN, VQGANConfig
from smalti.models.config import TransformerConfig
from smalti.models.decoder_only import new_model
from smalti.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from smalti.models.rar import RAR, RARConfig
from smalti.planning.footprint import Task, example
from smalti.sequences.layout import Layout
from smalti.sequences.request import Request
from smalti.sequences.vocabulary import FEATURES, Vocabulary
from smalti.training.token_model import NextTokenLoss, TrainConfig

SIZES = {"num_layers": 2, "d_model": 16, "num_heads": 2, "d_ff": 24}
LLAMAGEN = {"norm": "rms", "feed_forward": "swiglu", "positions": "rotary_2d", "grid": (2, 2)}
CLASSES = Layout.parse(Vocabulary({"label": 4, "image": 11}), {"class": "(label{1}) image{4}"})
CAPTIONS = Layout.parse(Vocabulary({FEATURES: 0, "image": 11}), {"caption": f"{FEATURES}{{3}} image{{4}}"})
RAR_SIZES = RARConfig(codebook_size=11, num_classes=3, num_codes=4, **SIZES)
TASKS = {
    "gpt": Task(
        TransformerConfig(max_length=DIGITS.max_length, dropout=0.1, **SIZES), DIGITS, TrainConfig(num_steps=1)
    ),
    "llamagen": Task(
        TransformerConfig(max_length=5, prefix_length=1, **SIZES, **LLAMAGEN), CLASSES, TrainConfig(num_steps=1)
    ),
    "features": Task(
        TransformerConfig(max_length=7, prefix_length=3, **SIZES, **LLAMAGEN), CAPTIONS, TrainConfig(num_steps=1), 5
    ),
    "rar": Task(RAR_SIZES, RAR_SIZES.layout, TrainConfig(num_steps=1)),
}


@pytest.fixture(autouse=True)
def nothing_asked(monkeypatch):
    monkeypatch.delenv(devices.DEVICE_VARIABLE, raising=False)
    monkeypatch.delenv(devices.DTYPE_VARIABLE, raising=False)


def test_auto_is_a_gpu_where_there_is_one_or_what_was_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device() == torch.device("cuda") and choose_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert choose_device() == torch.device("cuda:3") and choose_device("cuda:1") == torch.device("cuda:1")
    monkeypatch.setenv(devices.DEVICE_VARIABLE, "cpu")
    monkeypatch.setenv(devices.DTYPE_VARIABLE, "bfloat16")
    assert choose_device() == torch.device("cpu") and choose_device("cuda:0") == torch.device("cuda:0")
    assert choose_dtype() == torch.bfloat16 and choose_dtype("float32") == torch.float32
    loaded = Bundle.load("digits")
    assert loaded.device.type == "cpu" and loaded.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("given", "message"),
    [("tpu", "unknown; give one of auto, cpu, cuda, mps"), ("cuda", "not there: torch finds no GPU")],
)
def test_a_device_that_is_not_there_is_named(given, message, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        choose_device(given)
    assert run(["--device", given, "generate", "dark green eight on bright cyan", "-o", str(tmp_path / "x.png")]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="dtype 'int4' is unknown"):
        choose_dtype("int4")


def test_commands_take_the_device_and_what_they_start_does_too(monkeypatch, capsys):
    monkeypatch.setenv(devices.DEVICE_VARIABLE, "auto")  # so that what the command sets is taken back
    monkeypatch.setenv(devices.DTYPE_VARIABLE, "auto")
    assert run(["--device", "cpu", "--dtype", "bfloat16", "info", "digits"]) == 0
    assert devices.choose_dtype() == torch.bfloat16
    assert "parameters" in capsys.readouterr().out


def on_meta(task: Task, num_rows: int = 3):
    with torch.device("meta"):
        made = RAR(task.shape) if isinstance(task.shape, RARConfig) else new_model(
            task.layout, task.shape, feature_width=task.feature_width
        )  # fmt: skip
    return made, example(task, num_rows).to(torch.device("meta"))


@pytest.mark.parametrize("name", TASKS)
def test_no_device_is_written_into_a_training_step(name):
    """Shapes alone: a tensor that is made on another device than the model's does not go together with it."""
    model, piece = on_meta(TASKS[name])
    nll = NextTokenLoss(model.train(), TASKS[name].layout)(piece.token_ids, piece.targets, None, piece.features)
    nll.sum().backward()
    assert nll.device.type == "meta" and all(p.grad.device.type == "meta" for p in model.parameters())


@pytest.mark.parametrize("name", ["gpt", "llamagen", "rar"])
@torch.no_grad()
def test_no_device_is_written_into_a_decode_step(name):
    model, piece = on_meta(TASKS[name])
    state = model.eval().new_state(4)
    uniforms = torch.rand(3, device="meta")
    slot = next(slot for slot in TASKS[name].layout.slots if slot.size > 1 and model.can_score(slot))
    for first, last in ((0, 2), (2, 3), (3, 4)):
        hidden = model.extend(state, slice(0, 3), piece.token_ids[:, first:last])
        logits = guide(model.logits(hidden, slot), model.logits(hidden, slot), torch.full((3, 1), 2.0, device="meta"))
        drawn, log_probs = sample(logits, uniforms, SampleConfig(top_k=3))
        assert drawn.shape == log_probs.shape == (3,) and drawn.device.type == "meta"
    ragged = model.extend(state, [0, 2], piece.token_ids[:2, :1])
    assert ragged.device.type == "meta"


@torch.no_grad()
def test_no_device_is_written_into_an_encoder_decoder():
    config = EncoderDecoderConfig(
        text_size=7, max_text=4, codebook_size=11, grid=(2, 2), encoder_layers=1, decoder_layers=1, d_model=16,
        num_heads=2, d_ff=24, local_kernel=3,
    )  # fmt: skip
    with torch.device("meta"):
        model = EncoderDecoder(config)
        text, lengths, codes = torch.zeros(3, 5, dtype=torch.long), torch.ones(3), torch.zeros(3, 4, dtype=torch.long)
    decoded = model.decode(codes, model.encode(text, lengths))
    assert model.head(decoded).shape == (3, 4, 11) and decoded.device.type == "meta"


@pytest.mark.parametrize(
    "make",
    [
        lambda: VQGAN(VQGANConfig()),
        lambda: ViTVQGAN(ViTVQGANConfig()),
        lambda: TiTok(TiTokConfig()),
    ],
    ids=["vqgan", "vit_vqgan", "titok"],
)
@torch.no_grad()
def test_no_device_is_written_into_an_image_tokenizer(make, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which knows no meta device
    monkeypatch.setattr(quantizer, "check_codes", lambda *_: None)  # which reads the largest, once a call
    with torch.device("meta"):
        tokenizer = make().eval()
    size = tokenizer.config.image_size
    rows, columns = (size, size) if isinstance(size, int) else size
    codes = tokenizer.encode_images(torch.zeros(2, 3, rows, columns, device="meta"))
    assert tokenizer.decode_codes(codes).shape == (2, 3, rows, columns) and codes.device.type == "meta"


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device: reading a number, or a size that depends on values."""

    def __init__(self):
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        self.num += func in (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("config", [SampleConfig(), SampleConfig(guidance_scale=2.0, top_k=5, top_p=0.9)], ids=str)
def test_a_decode_step_waits_for_its_tokens_alone(config):
    """On the host tokens are lists: `Draws.rows` fetches them, all of a step together, and reads no number singly."""
    engine = Engine(tiny_model(DIGITS), DIGITS, capacity=4, executor="eager")
    null = Request(order="image to text")
    for seed in range(4):
        given = {"text": torch.tensor([seed, 0, 6])}
        engine.submit(Request(order="text to image", given=given, seed=seed, null=null), config)
    engine.step()  # prompts, of which the guided ones differ in length
    with Waits() as waits:
        for _ in range(3):
            engine.step()
    assert waits.num == 0
