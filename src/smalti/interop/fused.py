"""Reading a foreign state dict into a token model of ours, whose tensors may be made of several foreign ones."""

from collections import Counter
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import NamedTuple, TypeAlias, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from smalti.errors import InputError, first_line
from smalti.interop.keys import Foreign, ImportReport, Moved, misfit, shape_problems
from smalti.weight_files import Nonfinite, count_nonfinite, nonfinite_notes, require_floating
from smalti.weights import BUILD_ERRORS, build_within

Module = TypeVar("Module", bound=nn.Module)


def halves_to_pairs(rows: Float[Tensor, "rows ..."], num_heads: int) -> Float[Tensor, "rows ..."]:
    """Rows of queries or keys, from rotating halves of a head to rotating neighbours."""
    return rows.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def pairs_to_halves(rows: Float[Tensor, "rows ..."], num_heads: int) -> Float[Tensor, "rows ..."]:
    """The inverse of `halves_to_pairs`."""
    return rows.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)


class Piece(NamedTuple):
    """A foreign tensor, or some of its rows; axes of length 1 before the rows are passed over."""

    key: str
    shape: tuple[int, ...]
    first: int = 0
    end: int | None = None
    rotary_heads: int = 0
    """Heads of queries or keys that rotate halves there, and neighbours here: their rows change places. 0: none do."""


PieceMap: TypeAlias = "dict[str, tuple[Piece, ...]]"
"""For every tensor of ours the foreign pieces it is made of, one above the other."""


def build_of(build: Callable[[], Module], state: Mapping[str, Tensor]) -> Module:
    """The module of a foreign config, which must not ask for much more memory than the weights take. Raises InputError
    where it does, and where no network can be built of it."""
    try:
        return build_within(build, sum(tensor.numel() for tensor in state.values()), "the file")
    except InputError:
        raise
    except BUILD_ERRORS as error:
        raise InputError(f"no network can be built of the config: {first_line(error)}.") from error


def read_fused(
    module: nn.Module,
    state: MutableMapping[str, Tensor],
    pieces: PieceMap,
    *,
    droppable: Mapping[str, str],
    sizes: str,
    allow_nonfinite: bool = False,
) -> ImportReport:
    """Fills the module, which is then in evaluation mode, with float32 weights that may share the memory of `state`,
    which is emptied on the way: what was converted need not stay in memory. `droppable` holds beginnings and ends of
    keys to pass over, with the reason. Raises InputError if a tensor is missing, has another shape, is left over, or
    holds values that are not finite, unless `allow_nonfinite`."""
    dropped = {
        key: reason for key in state for part, reason in droppable.items() if key.startswith(part) or key.endswith(part)
    }
    key_map = {piece.key: Foreign(piece.key, piece.shape) for made_of in pieces.values() for piece in made_of}
    if problems := shape_problems(state, key_map, dropped):
        raise InputError(misfit(problems))
    require_floating(state, key_map)
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    places = {key: place for place, key in enumerate(state)}
    uses = Counter(piece.key for made_of in pieces.values() for piece in made_of)
    ours, nonfinite = dict[str, Tensor](), dict[str, Nonfinite]()
    for name in sorted(pieces, key=lambda name: places[pieces[name][0].key]):  # as the file has them
        ours[name] = _joined(state, pieces[name], shapes[name])
        for key in (piece.key for piece in pieces[name]):
            uses[key] -= 1
            if not uses[key]:
                nonfinite[key] = count_nonfinite(state.pop(key))
    notes = nonfinite_notes(nonfinite, allow_nonfinite=allow_nonfinite)
    module.load_state_dict(ours, assign=True)  # not copied: what is one foreign tensor is in memory once
    module.eval()
    moved = tuple(Moved(piece.key, name, piece.shape) for name, made_of in pieces.items() for piece in made_of)
    return ImportReport(sizes=sizes, moved=moved, dropped=tuple(dropped.items()), notes=notes)


def _joined(state: Mapping[str, Tensor], made_of: Sequence[Piece], shape: torch.Size) -> Tensor:
    rows = [_rows(state[piece.key].reshape(-1, *shape[1:]), piece) for piece in made_of]
    if len(rows) == 1:
        return rows[0].float().contiguous()
    return torch.cat(rows, out=torch.empty(0))  # converted on the way: no copy in float32 beside it


def _rows(tensor: Tensor, piece: Piece) -> Tensor:
    rows = tensor[piece.first : piece.end]
    return halves_to_pairs(rows, piece.rotary_heads) if piece.rotary_heads else rows


def write_fused(module: nn.Module, pieces: PieceMap) -> dict[str, Tensor]:
    """The foreign state dict of a module: the inverse of `read_fused`. Rows of a foreign tensor that have no place in
    ours are zero."""
    ours, state = module.state_dict(), dict[str, Tensor]()
    for name, made_of in pieces.items():
        at, tensor = 0, ours[name].detach().cpu()
        for piece in made_of:
            if piece.key not in state:
                state[piece.key] = torch.zeros(piece.shape, dtype=tensor.dtype)
            rows = state[piece.key].view(-1, *tensor.shape[1:])[piece.first : piece.end]
            new = tensor[at : at + len(rows)]
            rows.copy_(pairs_to_halves(new, piece.rotary_heads) if piece.rotary_heads else new)
            at += len(rows)
    return state
