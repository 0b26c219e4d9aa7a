"""What stood to choose at a cell of a picture: how likely each code was there, and what the model attended to.

Letters: L cells, T tokens, N heads, n ids of a slot.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from smalti.engine.sampling import SampleConfig, guide, reshape
from smalti.inspect.attention import attention_weights
from smalti.models.base import SequenceModel
from smalti.sequences.layout import Layout, Slot
from smalti.sequences.request import Request, TokenSequence


class CellChoice(NamedTuple):
    """Of one cell."""

    probs: Float[Tensor, " n"]
    """Of each code, as it was drawn from: guided, with temperature and filters."""
    model_probs: Float[Tensor, " n"]
    """The model's own: neither guided nor filtered, at temperature 1."""
    to_tokens: Float[Tensor, " T"]
    """Attention to each token before the cell, averaged over layers and heads; sums to 1."""
    given: int
    """How many of the T tokens stand before the first cell."""


@torch.no_grad()
def choice_at(
    model: SequenceModel,
    layout: Layout,
    request: Request,
    codes: Sequence[int] | Int[Tensor, " L"],
    cell: int,
    config: SampleConfig,
) -> CellChoice:
    """The choice at `cell` of a picture that `request` drew, of which `codes` are the codes. By one pass over the
    whole sequence, so it differs from what an executor computed by rounding. Raises ValueError for what does not fit.
    """
    before = torch.as_tensor(codes, dtype=torch.long)[:cell]
    token_ids, given, slot = _sequence_before(layout, request, before)
    cond = _logits(model, token_ids, slot)
    guided, scale = cond, config.guidance_at(cell, layout[request.order or ""].span("image").length)
    if scale != 1:
        if request.null is None:
            raise ValueError("guidance needs a null condition in the request (Request.null).")
        null_ids, _, _ = _sequence_before(layout, request.null, before)
        guided = guide(cond, _logits(model, null_ids, slot), scale)
    if config.temperature == 0:
        probs = torch.zeros_like(guided).scatter(-1, guided.argmax(-1, keepdim=True), 1.0)
    else:
        probs = reshape(guided, config).softmax(-1)
    weights = attention_weights(model, token_ids[None])  # type: ignore[arg-type]
    mean = torch.stack([layer[0, :, -1].mean(0) for layer in weights]).mean(0)
    return CellChoice(probs[0].cpu(), cond.softmax(-1)[0].cpu(), mean.cpu(), given)


def _sequence_before(
    layout: Layout, request: Request, codes: Int[Tensor, " before"]
) -> tuple[Int[Tensor, " T"], int, Slot]:
    """The tokens before a cell, how many of them stand before the picture, and what can stand at the cell."""
    given = {name: values for name, values in request.given.items() if name != "image"}
    start = TokenSequence(layout, Request(order=request.order, given=given))
    whole = Request(order=request.order, given={**given, "image": codes} if len(codes) else given)
    sequence = TokenSequence(layout, whole)
    slot = layout.slots[sequence.plan().slot_ids[0]]
    return torch.tensor(sequence.token_ids), len(start.token_ids), slot


def _logits(model: SequenceModel, token_ids: Int[Tensor, " T"], slot: Slot) -> Float[Tensor, "1 n"]:
    return model.logits(model.hidden(token_ids[None].to(model.device))[:, -1], slot).float()
