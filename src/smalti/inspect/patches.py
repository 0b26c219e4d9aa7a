"""What codes look like, where there is an image tokenizer: average patches, pictures of a swap, the decoded lens.

Letters: N pictures, K codes, h w code grid, C channels, p q the pixels of a cell.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from smalti.image_tokenizers import ImageTokenizer


@torch.no_grad()
def average_patches(
    image_tokenizer: ImageTokenizer, codes: Int[Tensor, "N h w"], *, batch_size: int = 128
) -> tuple[Float[Tensor, "K C p q"], Int[Tensor, " K"]]:
    """The mean of what the decoder paints in a code's cell, in [0, 1], and how many cells that is over; 0 where a code
    does not occur.

    Raises ValueError if the codes are no grid (one row of latents), or their cells are not whole pixels.
    """
    N, h, w = codes.shape
    if h == 1:
        raise ValueError("codes in one row have no cells in the picture; average patches need a grid of codes.")
    K = image_tokenizer.config.codebook_size
    sums: Tensor | None = None
    for start in range(0, N, batch_size):
        part = codes[start : start + batch_size]
        images = image_tokenizer.decode_codes(part).clamp(0, 1)
        B, C, H, W = images.shape
        if H % h or W % w:
            raise ValueError(f"pictures of {H}×{W} pixels do not divide into {h}×{w} cells.")
        cells = images.view(B, C, h, H // h, w, W // w).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)  # (B * h * w, C, p, q)
        if sums is None:
            sums = cells.new_zeros(K, *cells.shape[1:])
        sums.index_add_(0, part.flatten(), cells)
    assert sums is not None
    count = torch.bincount(codes.flatten(), minlength=K)
    return sums / count.clamp(min=1).view(-1, 1, 1, 1), count


@torch.no_grad()
def swap_picture(
    image_tokenizer: ImageTokenizer, codes: Int[Tensor, "h w"], code: int, other: int
) -> Float[Tensor, "2 C H W"]:
    """A picture as it is, and with every `code` replaced by `other`; in [0, 1]."""
    both = torch.stack([codes, torch.where(codes == code, other, codes)])
    return image_tokenizer.decode_codes(both).clamp(0, 1)


@torch.no_grad()
def decoded(image_tokenizer: ImageTokenizer, codes: Int[Tensor, "N h w"]) -> Float[Tensor, "N C H W"]:
    """The pictures of codes, in [0, 1]."""
    return image_tokenizer.decode_codes(codes).clamp(0, 1)


def code_atlas(average: Float[Tensor, "K C p q"], num_cells: Int[Tensor, " K"]) -> Float[Tensor, "C H W"]:
    """One picture of the average patches of all codes that occur, about as many in a row as rows: dark ones above, and
    in each row from blue to red."""
    patches = average[num_cells > 0]
    mean = patches.mean((2, 3))
    side = math.ceil(math.sqrt(len(patches)))
    order = mean.mean(1).argsort(stable=True)
    redness = mean[:, 0] - mean[:, -1]
    rows = [row[redness[row].argsort(stable=True)] for row in order.split(side)]
    _, C, p, q = patches.shape
    picture = patches.new_ones(C, len(rows) * p, side * q)
    for number, row in enumerate(rows):
        for place, code in enumerate(row.tolist()):
            picture[:, number * p : (number + 1) * p, place * q : (place + 1) * q] = patches[code]
    return picture


@torch.no_grad()
def decoded_lens(
    image_tokenizer: ImageTokenizer, likeliest: Int[Tensor, "layers N h w"]
) -> Float[Tensor, "layers N C H W"]:
    """The pictures of the likeliest codes after each layer, every code predicted from the true ones before it (see
    `causes.logit_lens`); in [0, 1]."""
    layers, N, h, w = likeliest.shape
    return image_tokenizer.decode_codes(likeliest.view(layers * N, h, w)).clamp(0, 1).unflatten(0, (layers, N))
