"""Pictures to the 299 × 299 of Inception, as each of the field's tools does it. FIDs of two resizers do not compare
(Parmar et al. 2022, arXiv:2104.11222).

- `tf1`: what stands in the TensorFlow graph of 2015, so ADM's evaluator, torch-fidelity and the original FID: bilinear
  between the two nearest pixels at i · in/out, without antialiasing, and without the half pixel by which newer resizers
  place pixel centres. A picture made smaller keeps only some of its pixels, and all move up and left.
- `clean`: clean-fid's. Pillow's bicubic, antialiased, of each channel by itself in floating point, clipped to [0, 255]
  and not rounded.
- `half-pixel`: pytorch-fid's. Bilinear with pixel centres at the half, without antialiasing.

Letters: B pictures, H W rows and columns. Pictures are bytes, what comes back is float32 in [0, 255].
"""

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

INCEPTION_SIDE = 299
RESIZERS = ("tf1", "clean", "half-pixel", "none")


def resized(
    pictures: UInt8[Tensor, "B 3 H W"], resizer: str, side: int = INCEPTION_SIDE
) -> Float[Tensor, "B 3 side side"]:
    """Raises ValueError for a resizer that there is not. "none" leaves the size as it is."""
    if resizer == "none":
        return pictures.float()
    if resizer == "tf1":
        return _tf1(pictures.float(), side)
    if resizer == "clean":
        return torch.stack([_clean(picture, side) for picture in pictures.cpu()]).to(pictures.device)
    if resizer == "half-pixel":
        return F.interpolate(pictures.float(), size=(side, side), mode="bilinear", align_corners=False)
    raise ValueError(f"resizer {resizer!r} is unknown; choose one of {', '.join(RESIZERS)}.")


def _tf1(images: Float[Tensor, "B 3 H W"], side: int) -> Float[Tensor, "B 3 side side"]:
    """TensorFlow 1's resize_bilinear with align_corners off (resize_bilinear_op.cc): across first, then down, each
    a + (b - a) · t in float32."""
    left, right, across = _neighbours(images.shape[3], side, images.device)
    upper, lower, down = _neighbours(images.shape[2], side, images.device)
    images = images[:, :, :, left] + (images[:, :, :, right] - images[:, :, :, left]) * across
    return images[:, :, upper] + (images[:, :, lower] - images[:, :, upper]) * down[:, None]


def _neighbours(size: int, side: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The two pixels between which each new one lies, and how far towards the second."""
    places = torch.arange(side, device=device, dtype=torch.float32) * torch.tensor(size / side, dtype=torch.float32)
    first = places.long()
    return first, (first + 1).clamp(max=size - 1), places - first


def _clean(picture: UInt8[Tensor, "3 H W"], side: int) -> Float[Tensor, "3 side side"]:
    channels = [
        np.asarray(Image.fromarray(channel).resize((side, side), Image.Resampling.BICUBIC)).clip(0, 255)
        for channel in picture.numpy().astype(np.float32)
    ]
    return torch.from_numpy(np.stack(channels).astype(np.float32))
