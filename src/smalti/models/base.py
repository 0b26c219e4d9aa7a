"""What a model of token sequences is, to whoever trains, scores or draws with it.

Letters: B batch, R rows of a state, T tokens, D model width, V vocabulary, n ids of a slot,
or features of a row, C their channels.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from smalti.models.decode_state import DecodeState, Rows
from smalti.sequences.layout import Layout, Slot
from smalti.sequences.request import TokenSequence


class Inputs(NamedTuple):
    """Whole sequences, where token ids alone do not say all. A tensor of token ids stands for `Inputs(token_ids)`."""

    token_ids: Int[Tensor, "B T"]
    """`FEATURE` where a feature stands in place of an id."""
    positions: Int[Tensor, "B T"] | None = None
    """Where each token stands, which need not be its number in the sequence: a picture in another order than raster, a
    grid behind a prefix of any length. None: one after the other."""
    targets: Int[Tensor, "B T"] | None = None
    """The position that each token is followed by, for models that are told (RAR); −1: they are told of none."""
    features: Float[Tensor, "B n C"] | None = None
    """What stands in place of the first ids; where there is an id it is not read."""


def inputs_of(inputs: Inputs | Int[Tensor, "B T"]) -> Inputs:
    return Inputs(inputs) if isinstance(inputs, Tensor) else inputs


class SequenceModel(Protocol):
    """p(token t | tokens < t), for whole sequences or step by step. Engine, executors, likelihood and loss see no more
    of a model than this."""

    training: bool

    @property
    def config(self) -> Any: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def vocab_size(self) -> int: ...

    def eval(self) -> Any: ...

    def train(self, mode: bool = True) -> Any: ...

    def check_layout(self, layout: Layout) -> None:
        """Raises ValueError if the model cannot read the layout's sequences."""
        ...

    def check_request(self, sequence: TokenSequence) -> None:
        """Raises ValueError if the model cannot draw what is missing of a sequence, naming the span."""
        ...

    def hidden(self, inputs: Inputs | Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """Hidden states of whole sequences; the one at position t predicts token t + 1."""
        ...

    def new_state(self, capacity: int, max_length: int | None = None) -> DecodeState:
        """Room for the keys and values of so many rows."""
        ...

    def extend(
        self, state: DecodeState, rows: Rows, token_ids: Int[Tensor, "R T"], counts: Sequence[int] | None = None
    ) -> Float[Tensor, "R D"]:
        """Runs new tokens of rows, the first `counts[i]` of row i (None: all T); returns what predicts the token behind
        each row's last. Raises ValueError where a row would get too long."""
        ...

    def extend_all(
        self, state: DecodeState, rows: Rows, token_ids: Int[Tensor, "R T"], counts: Sequence[int] | None = None
    ) -> Float[Tensor, "R T D"]:
        """`extend`, returning what predicts the token behind each of the new ones: to verify drafts."""
        ...

    def can_score(self, slot: Slot) -> bool:
        """Whether there are scores for all ids of a slot."""
        ...

    def logits(self, hidden: Float[Tensor, "... D"], slot: Slot | None = None) -> Float[Tensor, "... n"]:
        """Scores of a slot's ids, in the slot's own numbering; None: of all V ids, −inf for those never predicted.
        Raises ValueError for a slot that cannot be scored."""
        ...


def last_of(hidden: Float[Tensor, "R T D"], counts: Sequence[int] | None) -> Float[Tensor, "R D"]:
    """The hidden state of each row's last real token; `counts` tells how many are real (None: all)."""
    if counts is None:
        return hidden[:, -1]
    return hidden[range(len(hidden)), [count - 1 for count in counts]]


@contextmanager
def evaluating(model: SequenceModel) -> Iterator[None]:
    """The model without dropout for a while; left as it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def check_drawable(model: SequenceModel, sequence: TokenSequence) -> None:
    """Raises ValueError, naming the span, if something is to be drawn that the model was only ever given."""
    layout = sequence.layout
    for order, index in sequence.open_parts():
        if not model.can_score(layout.slots[layout.slot_index(order.name, index)]):
            raise ValueError(
                f"order {order.name!r} ({order}): {order.parts[index]} cannot be drawn, since the model was always "
                "given it and never learned to predict it. Give it whole, or name an order that predicts it."
            )


def check_own_layout(who: str, own: Layout, layout: Layout) -> None:
    """Raises ValueError unless a layout is the one that a model reads alone."""
    if (layout.vocabulary, list(layout.orders.values())) != (own.vocabulary, list(own.orders.values())):
        raise ValueError(f"{who} reads {own!r} alone, with {own.vocabulary}; the layout is {layout!r}.")
