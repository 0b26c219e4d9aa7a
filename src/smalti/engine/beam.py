"""Beam search: the likeliest sequences that a few running candidates find."""

from collections.abc import Sequence

import torch

from smalti.engine.executors import make_executor
from smalti.engine.generate import job_executor
from smalti.models.base import SequenceModel, evaluating
from smalti.sequences.layout import Layout
from smalti.sequences.request import Generated, Request, TokenSequence


@torch.no_grad()
def beam_search(
    model: SequenceModel, layout: Layout, requests: Sequence[Request], beam_width: int, *, batch_size: int = 64
) -> list[list[Generated]]:
    """For each request, the `beam_width` likeliest sequences a beam finds, the likeliest first; nothing is random.

    There are fewer where fewer are possible. Searches through spans of fixed length; raises ValueError where an open
    span (`{..n}`) is to be generated.
    """
    if beam_width < 1:
        raise ValueError(f"beam_width is {beam_width}; a beam holds at least one sequence.")
    sequences = [TokenSequence(layout, request) for request in requests]
    for sequence in sequences:
        model.check_request(sequence)
    found: dict[int, list[Generated]] = {}
    groups: dict[tuple, list[int]] = {}
    for row, sequence in enumerate(sequences):
        if sequence.is_finished:
            found[row] = [sequence.finished()]
            continue
        plan = sequence.plan()
        if plan.stop >= 0 or sequence.chooses_order:
            raise ValueError(f"beam search needs a given order and spans of fixed length, not {sequence.order}.")
        groups.setdefault((tuple(plan.slot_ids), len(sequence.token_ids)), []).append(row)
    per_batch = max(1, batch_size // beam_width)
    executor = job_executor(model, layout, len(requests), per_batch)
    with evaluating(model):
        for rows in groups.values():
            for start in range(0, len(rows), per_batch):
                chunk = rows[start : start + per_batch]
                beams = _beam(model, layout, [sequences[row] for row in chunk], beam_width, executor)
                found.update(zip(chunk, beams, strict=True))
    return [found[row] for row in range(len(requests))]


def _beam(
    model: SequenceModel, layout: Layout, batch: list[TokenSequence], width: int, executor: str
) -> list[list[Generated]]:
    """Beams of sequences that have the same plan. Rows b·width .. b·width + width − 1 are sequence b's beam."""
    plan, B = batch[0].plan(), len(batch)
    runner = make_executor(model, executor)
    state, rows = runner.new_state(B * width, layout.max_length), slice(0, B * width)
    firsts = range(0, B * width, width)
    for first, sequence in zip(firsts, batch, strict=True):
        state.begin(first, sequence.features)
    hidden = runner.extend(state, list(firsts), [sequence.token_ids for sequence in batch])
    hidden = hidden.repeat_interleave(width, 0)  # all of a beam starts as one sequence
    state.copy([first for first in firsts for _ in range(width - 1)], [row for row in range(B * width) if row % width])
    scores = torch.full((B, width), -torch.inf, dtype=torch.float64)
    scores[:, 0] = 0
    tokens = torch.zeros(B * width, 0, dtype=torch.long)
    log_probs = torch.zeros(B * width, 0)
    for step, (slot_id, forced) in enumerate(zip(plan.slot_ids, plan.forced, strict=True)):
        parents = torch.arange(B * width)
        added, new = torch.zeros(B * width), torch.full((B * width,), forced)
        if forced < 0:
            slot = layout.slots[slot_id]
            step_log_probs = runner.logits(hidden, slot).float().log_softmax(-1).cpu()  # (B * width, n)
            total = scores[:, :, None] + step_log_probs.view(B, width, -1).double()
            scores, best = total.flatten(1).topk(width, dim=-1)
            parents = (best // slot.size + torch.arange(B)[:, None] * width).flatten()
            local = (best % slot.size).flatten()
            new, added = slot.token_ids(local), step_log_probs[parents, local]
            state.copy(parents.tolist(), range(B * width))
        tokens = torch.cat((tokens[parents], new[:, None]), dim=1)
        log_probs = torch.cat((log_probs[parents], added[:, None]), dim=1)
        if step + 1 < len(plan.slot_ids):
            hidden = runner.extend(state, rows, new[:, None].tolist())
    possible = torch.isfinite(scores).flatten()  # a beam wider than the sequences there are holds impossible ones
    return [
        [
            sequence.completed(tokens[row].tolist(), log_probs[row].tolist())
            for row in range(b * width, (b + 1) * width)
            if possible[row]
        ]
        for b, sequence in enumerate(batch)
    ]
