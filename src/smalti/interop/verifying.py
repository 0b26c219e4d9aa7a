"""Recomputing every output array of a reference folder: `config.json`, a weight file, `io.npz`.

The folder's inputs are run through the image tokenizer as imported from its weights, and the results compared
with the folder's outputs: real numbers to `TOLERANCE`, whole numbers exactly.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from smalti.arrays import read_npz
from smalti.errors import InputError, first_line
from smalti.image_tokenizers.open_magvit2 import OpenMAGVIT2
from smalti.image_tokenizers.quantizer import Quantized
from smalti.image_tokenizers.vit_vqgan import ViTVQGAN
from smalti.image_tokenizers.vqgan import VQGAN
from smalti.interop.keys import KeyLayout, import_foreign
from smalti.weight_files import read_config, read_weights

TOLERANCE = 1e-4
"""Largest absolute error in float32 on a CPU."""

INPUT_NAMES = ("image", "image_nonsquare", "random_indices")
WEIGHT_NAMES = ("weights.pt", "weights.bin", "model.safetensors", "weights.safetensors", "weights.ckpt")


class ArrayError(NamedTuple):
    """`largest_error` is the largest absolute difference, or for whole numbers the count of unequal entries;
    infinite where the shapes differ."""

    name: str
    shape: tuple[int, ...]
    largest_error: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.largest_error <= self.tolerance  # false for NaN


class ReferenceArrays(dict[str, Tensor]):
    """The arrays of an `io.npz` by name."""

    def __missing__(self, name: str) -> Tensor:
        raise InputError(f"io.npz has no array {name!r}, which the outputs it has are computed from.")


def read_reference(layout: KeyLayout, directory: Path) -> tuple[nn.Module, ReferenceArrays]:
    """The image tokenizer of a reference folder, from its own weights and config, and its arrays. Raises InputError
    if a file is missing or the weights do not fit the config."""
    weights = read_weights(find_weights(directory))
    module, _ = import_foreign(layout, weights.tensors, read_config(directory / "config.json"))
    return module, read_arrays(directory / "io.npz")


def compare(layout: KeyLayout, module: nn.Module, arrays: ReferenceArrays) -> list[ArrayError]:
    """The largest error of every output in `arrays`, as `module` computes them from the inputs there. Raises
    InputError if an array is not known for this kind."""
    return compare_outputs(layout.name, layout.outputs(module, arrays), arrays, INPUT_NAMES)


@torch.inference_mode()
def compare_outputs(
    kind: str,
    outputs: Mapping[str, Callable[[], Tensor]],
    arrays: ReferenceArrays,
    inputs: Sequence[str],
    tolerances: Mapping[str, float] | None = None,
) -> list[ArrayError]:
    """The largest error of every array that is not among `inputs`, as `outputs` computes it, allowed up to TOLERANCE or
    what `tolerances` says of it; infinite where a code it
    is computed from lies outside the codebook. Raises InputError if there is no such array, or one that `outputs` does
    not know."""
    wanted = [name for name in arrays if name not in inputs]
    if not wanted:
        raise InputError("io.npz holds no outputs, so there is nothing to verify.")
    unknown = [name for name in wanted if name not in outputs]
    if unknown:
        raise InputError(
            f"io.npz holds {', '.join(unknown)}, which is not known for {kind}; known outputs are "
            f"{', '.join(outputs)}, and inputs {', '.join(inputs)}."
        )
    allowed = tolerances or {}
    return [_array_error(name, arrays[name], outputs[name], allowed.get(name, TOLERANCE)) for name in wanted]


def find_weights(directory: Path) -> Path:
    """The weight file of a reference folder."""
    found = [directory / name for name in WEIGHT_NAMES if (directory / name).is_file()]
    if len(found) != 1:
        raise InputError(
            f"{directory} holds {len(found)} weight files; a reference folder has exactly one of "
            f"{', '.join(WEIGHT_NAMES)}, beside config.json and io.npz."
        )
    return found[0]


def read_arrays(path: Path) -> ReferenceArrays:
    """The arrays of an `.npz` file; one that would need unpickling is refused."""
    arrays = read_npz(path, "fetch or make the reference folder again")
    try:
        return ReferenceArrays({name: torch.from_numpy(array) for name, array in arrays.items()})
    except TypeError as error:  # numbers that torch does not have, such as some unsigned ones
        raise InputError(f"{path} cannot be read as reference arrays: {first_line(error)}.") from error


def _array_error(name: str, expected: Tensor, compute: Callable[[], Tensor], allowed: float) -> ArrayError:
    shape = tuple(expected.shape)
    whole = not expected.is_floating_point()
    tolerance = 0.0 if whole else allowed
    try:
        ours = compute()
    except InputError:
        raise
    except ValueError:  # a code that the network does not have: the folder differs from it, which is what is asked
        return ArrayError(name, shape, float("inf"), tolerance)
    if ours.is_floating_point() == whole or tuple(ours.shape) != shape:
        return ArrayError(name, shape, float("inf"), tolerance)
    if whole:
        error = float((ours != expected).sum())
    else:
        error = float((ours.double() - expected.double()).abs().max())
    return ArrayError(name, shape, error, tolerance)


def grid_outputs(
    image_tokenizer: VQGAN | ViTVQGAN | OpenMAGVIT2, arrays: ReferenceArrays, low: float, decoder_patch: int
) -> dict[str, Callable[[], Tensor]]:
    """The outputs shared by all folders with pictures in [low, 1], channels first, and a grid of codes. Latents
    come as (B, E, h, w); codes in the shape the folder has them, often (B, h*w)."""

    def to_ours(pictures: Tensor) -> Tensor:
        return (pictures - low) / (1 - low)

    def latents_of(pictures: str) -> Tensor:
        return image_tokenizer.encode_latents(to_ours(arrays[pictures]))

    def codes_of(pictures: str) -> Tensor:
        return image_tokenizer.quantizer.encode(latents_of(pictures))

    def decode(codes: Tensor) -> Tensor:
        return image_tokenizer.decode_codes(codes) * (1 - low) + low

    def on_grid(codes: str, decoded: str) -> Tensor:
        B, _, height, width = arrays[decoded].shape
        rows, columns = height // decoder_patch, width // decoder_patch
        if arrays[codes].numel() != B * rows * columns:
            raise InputError(
                f"{codes} {list(arrays[codes].shape)} does not fill the grid of {rows} x {columns} codes of {decoded}."
            )
        return arrays[codes].view(B, rows, columns)

    def as_listed(pictures: str, codes: str) -> Tensor:
        ours = codes_of(pictures)
        return ours.view(arrays[codes].shape) if ours.numel() == arrays[codes].numel() else ours

    return {
        "z_e": lambda: latents_of("image").movedim(-1, 1),
        "indices": lambda: as_listed("image", "indices"),
        "z_q": lambda: image_tokenizer.quantizer.lookup(codes_of("image")).movedim(-1, 1),
        "reconstruction": lambda: decode(codes_of("image")),
        "decoded": lambda: decode(on_grid("indices", "decoded")),
        "random_decoded": lambda: decode(on_grid("random_indices", "random_decoded")),
        "nonsquare_z_e": lambda: latents_of("image_nonsquare").movedim(-1, 1),
        "nonsquare_indices": lambda: as_listed("image_nonsquare", "nonsquare_indices"),
        "nonsquare_z_q": lambda: image_tokenizer.quantizer.lookup(codes_of("image_nonsquare")).movedim(-1, 1),
        "nonsquare_reconstruction": lambda: decode(codes_of("image_nonsquare")),
    }


def quantized(image_tokenizer: VQGAN | ViTVQGAN, arrays: ReferenceArrays, low: float) -> Quantized:
    """The quantizer's results on the folder's `image`, losses included."""
    images = (arrays["image"] - low) / (1 - low)
    return image_tokenizer.quantizer(image_tokenizer.encode_latents(images))
