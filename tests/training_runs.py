"""Runs that must be processes of their own: `python training_runs.py NAME DIRECTORY`, from test_train_model.py.

Each forks its children, so that torch is imported once.
"""

import os
import signal
import socket
import sys
import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch._dynamo  # the first optimizer would import it, in every child anew

from smalti.errors import InputError
from smalti.models.config import TransformerConfig
from smalti.models.encoder_decoder import EncoderDecoderConfig
from smalti.models.rar import RARConfig
from smalti.sequences.layout import Layout
from smalti.sequences.vocabulary import Vocabulary
from smalti.training import token_model
from smalti.training.curves import Curves
from smalti.training.token_model import TokenArrays, TrainConfig, train_model

SHAPE = TransformerConfig(num_layers=2, d_model=12, num_heads=3, d_ff=20, max_length=12, dropout=0.1)
VOCABULARY = Vocabulary({"special": ["<bos>", "<image>", "<text>"], "image": 17, "text": 7})
FIXED = Layout.parse(
    VOCABULARY, {"t2i": "<bos> <text> text{3} <image> image{5}", "i2t": "<bos> <image> image{5} <text> text{3}"}
)
OPEN = Layout.parse(
    VOCABULARY,
    {"t2i": ("<bos> <text> text{..4} <image> image{5}", 1.0), "i2t": ("<bos> <image> (image{5}) <text> text{3}", 2.0)},
)


def arrays(num_rows: int, seed: int = 0, text_length: int = 3) -> TokenArrays:
    generator = np.random.default_rng(seed)
    return TokenArrays(generator.integers(0, 17, (num_rows, 5)), generator.integers(0, 7, (num_rows, text_length)))


class KillingArrays(TokenArrays):
    """Pairs that kill the process with SIGKILL when they are read for the nth time."""

    reads_left = 0

    def batch(self, rows):
        KillingArrays.reads_left -= 1
        if KillingArrays.reads_left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().batch(rows)


def in_child(work) -> int:
    """Runs `work` in a forked process; returns its exit status, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


RESUMED = TrainConfig(
    num_epochs=3,
    batch_size=6,
    num_micro_batches=2,
    schedule="cosine",
    warmup_steps=3,
    weight_decay=0.1,
    max_grad_norm=0.5,
    ema_decay=0.9,
    checkpoint_every=3,
)
"""29 rows: 15 steps, with batches that reach over the end of an epoch and epochs that end between checkpoints."""


def resume(directory: Path) -> None:
    """Three times killed and resumed, beside a run that was left alone."""
    train, validation = arrays(29), arrays(5, seed=1)

    def run(folder: str, pairs: TokenArrays) -> None:
        model = train_model(SHAPE, FIXED, pairs, validation, RESUMED, directory / folder, show_progress=False)
        torch.save(model.state_dict(), directory / f"{folder}.pt")

    assert in_child(partial(run, "whole", train)) == 0
    for reads in np.random.default_rng(int.from_bytes(os.urandom(4))).integers(1, 30, 3).tolist():
        KillingArrays.reads_left = reads
        killing = KillingArrays(train.image_tokens, train.text_tokens)
        print("killed at read", reads, "status", in_child(partial(run, "killed", killing)))
    assert in_child(partial(run, "killed", train)) == 0


def distributed(directory: Path) -> None:
    """The same training in one process and in two, in float64, with a fixed and an open layout."""
    torch.set_default_dtype(torch.float64)
    shape = TransformerConfig(num_layers=1, d_model=12, num_heads=3, d_ff=20, max_length=12)
    config = TrainConfig(num_steps=5, batch_size=8, num_micro_batches=2, max_grad_norm=0.5, ema_decay=0.5)

    def run(folder: str, name: str, layout: Layout, environment: dict[str, str]) -> None:
        os.environ.update(environment)
        path = directory / folder / name
        model = train_model(shape, layout, arrays(29), arrays(7, seed=1), config, path, show_progress=False)
        assert not torch.distributed.is_initialized()
        if environment.get("RANK", "0") == "0":
            torch.save(model.state_dict(), path / "final.pt")

    for name, layout in (("fixed", FIXED), ("open", OPEN)):
        assert in_child(partial(run, "one", name, layout, {})) == 0
        # A port of its own for every group: a process that comes early must not find the group before.
        ranks = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        children = []
        for rank in ("0", "1"):
            pid = os.fork()
            if pid == 0:
                run("two", name, layout, ranks | {"RANK": rank, "LOCAL_RANK": rank})
                os._exit(0)
            children.append(pid)
        assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0, 0]


SHARED_OUT = TransformerConfig(
    num_layers=2, d_model=16, num_heads=4, d_ff=24, max_length=12, norm="rms", feed_forward="swiglu"
)
STEPS = TrainConfig(
    num_steps=20,
    batch_size=8,
    num_micro_batches=2,
    max_grad_norm=0.5,
    weight_decay=0.1,
    ema_decay=0.5,
    checkpoint_every=5,
    recompute=True,
    precision="float32",
    compile=False,
)
HALF, QUARTER = {"sharding": "full"}, {"sharding": "full", "tensor_parallel": 2}


def in_ranks(size: int, work) -> list[int]:
    """Runs `work` in so many processes of one run; returns their exit statuses, minus the signal that ended them."""
    group = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    children = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            os.environ.update(group | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            try:
                work()
            except InputError as error:
                print(f"error of {rank}: {error}", flush=True)
                os._exit(2)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]


def shared_out(
    directory: Path, *, model=SHARED_OUT, layout: Layout = FIXED, until: int = 99, kill: bool = False, **how
):
    """A run of STEPS that ends before step `until`, by SIGKILL of the second process if it is to `kill`."""
    real = token_model.train_step

    def stopping(state, *rest):
        if state.step == until and kill and os.environ.get("RANK") == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        if state.step == until and not kill:
            os._exit(0)
        return real(state, *rest)

    token_model.train_step = stopping
    config = replace(STEPS, **how)
    text_length = 1 if "label" in layout.vocabulary.segments else 3
    train, validation = arrays(29, 0, text_length), arrays(7, 1, text_length)
    trained = train_model(model, layout, train, validation, config, directory, show_progress=False)
    if os.environ.get("RANK", "0") == "0":
        torch.save(trained.state_dict(), directory / "final.pt")


def sharded(directory: Path) -> None:
    """One process beside two, then four in pairs, then one, which go on from one another; and one that is killed."""
    assert in_ranks(1, partial(shared_out, directory / "one")) == [0]
    for size, until, how in ((2, 7, HALF), (4, 13, QUARTER), (1, 99, {})):
        assert in_ranks(size, partial(shared_out, directory / "many", until=until, **how)) == [0] * size
    print("killed", in_ranks(2, partial(shared_out, directory / "killed", until=7, kill=True, **HALF)), flush=True)
    assert in_ranks(2, partial(shared_out, directory / "killed", **HALF)) == [0, 0]


def sharded_families(directory: Path) -> None:
    """A RAR, whose queries and keys are normed, a GPT and a Parti in shares of layers; plain runs that go on so."""
    rar = RARConfig(codebook_size=17, num_classes=7, num_codes=5, num_layers=2, d_model=16, num_heads=4, d_ff=24,
                    dropout=0.0, attention_dropout=0.0)  # fmt: skip
    gpt = TransformerConfig(num_layers=2, d_model=16, num_heads=4, d_ff=24, max_length=12)
    parti = EncoderDecoderConfig(text_size=7, max_text=4, codebook_size=17, grid=(1, 5), encoder_layers=1,
                                 decoder_layers=2, d_model=16, num_heads=4, d_ff=24, dropout=0.0)  # fmt: skip
    for name, model, layout in (("rar", rar, rar.layout), ("gpt", gpt, FIXED), ("parti", parti, parti.layout)):
        how = {"model": model, "layout": layout}
        assert in_ranks(1, partial(shared_out, directory / f"{name}-one", **how)) == [0]
        assert in_ranks(1, partial(shared_out, directory / f"{name}-many", until=12, **how)) == [0]
        assert in_ranks(2, partial(shared_out, directory / f"{name}-many", **how, **QUARTER)) == [0, 0]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    torch.set_num_threads(1)
    Curves.draw = lambda self: None  # most of the time of a run as short as these
    known = {"resume": resume, "distributed": distributed, "sharded": sharded, "sharded_families": sharded_families}
    if sys.argv[1].startswith("sharded"):  # imported once, before there are children
        import torch.distributed.checkpoint

    known[sys.argv[1]](Path(sys.argv[2]))
