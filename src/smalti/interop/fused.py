"""Reading a foreign state dict into a token model of ours, whose tensors may be made of several foreign ones."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from smalti.errors import InputError
from smalti.interop.keys import Foreign, ImportReport, Moved, misfit, shape_problems
from smalti.weight_files import require_values


class Piece(NamedTuple):
    """A foreign tensor, or some of its rows; axes of length 1 before the rows are passed over."""

    key: str
    shape: tuple[int, ...]
    first: int = 0
    end: int | None = None


PieceMap: TypeAlias = "dict[str, tuple[Piece, ...]]"
"""For every tensor of ours the foreign pieces it is made of, one above the other."""


def read_fused(
    module: nn.Module,
    state: Mapping[str, Tensor],
    pieces: PieceMap,
    *,
    droppable: Mapping[str, str],
    sizes: str,
    allow_nonfinite: bool = False,
) -> ImportReport:
    """Fills the module, which is then in evaluation mode. `droppable` holds beginnings and ends of keys to pass over,
    with the reason. Raises InputError if a tensor is missing, has another shape, is left over, or holds values that are
    not finite, unless `allow_nonfinite`."""
    dropped = {
        key: reason for key in state for part, reason in droppable.items() if key.startswith(part) or key.endswith(part)
    }
    key_map = {piece.key: Foreign(piece.key, piece.shape) for made_of in pieces.values() for piece in made_of}
    if problems := shape_problems(state, key_map, dropped):
        raise InputError(misfit(problems))
    notes = require_values(state, key_map, allow_nonfinite=allow_nonfinite)
    ours = {name: tensor.shape for name, tensor in module.state_dict().items()}
    module.load_state_dict({name: _joined(state, made_of, ours[name]) for name, made_of in pieces.items()})
    module.eval()
    moved = tuple(Moved(piece.key, name, piece.shape) for name, made_of in pieces.items() for piece in made_of)
    return ImportReport(sizes=sizes, moved=moved, dropped=tuple(dropped.items()), notes=notes)


def _joined(state: Mapping[str, Tensor], made_of: Sequence[Piece], shape: torch.Size) -> Tensor:
    rows = [state[piece.key].float().reshape(-1, *shape[1:])[piece.first : piece.end] for piece in made_of]
    return torch.cat(rows)
