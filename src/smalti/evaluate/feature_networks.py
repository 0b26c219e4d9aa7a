"""What looks at pictures so that sets of them can be compared: networks by the name that the command line has for them.

- a weight file: FID's Inception, VGG16 or ConvNeXt-S of torchvision, or a judge, told apart by their keys;
- a folder of a CLIP or DINOv2 model as its authors publish it for transformers (extra "t5"), for CMMD and its like;
- `judge`: a small classifier trained on the reference's classes; `tokenizer`: what a bundle's image tokenizer makes of
  pictures, its quantized latents pooled to 4 × 4.

Every network is known by the hash of its weights: figures of two do not compare. They run in float32.

Letters: B pictures, H W rows and columns, D features.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from smalti.data.labelled_pictures import Labelled, open_labelled
from smalti.devices import choose_device
from smalti.documents import read_json
from smalti.errors import InputError
from smalti.evaluate.classes import MOST_TRAINING, Judge, train_judge
from smalti.evaluate.inception import MARK, Inception
from smalti.evaluate.protocols import Protocol
from smalti.evaluate.resizers import resized
from smalti.files import new_file
from smalti.image_tokenizers.perceptual import LPIPS, VGG16_TAPS, ConvNeXtDistance, load_strictly
from smalti.weight_files import read_weights
from smalti.weights import file_sha256, weights_sha256

JUDGE, TOKENIZER, INCEPTION = "judge", "tokenizer", "inception"
JUDGE_MARK = "convolutions.0.weight"


class Found(NamedTuple):
    """What a network makes of pictures."""

    pooled: Float[Tensor, "B D"]
    spatial: Float[Tensor, "B _"] | None = None
    logits: Float[Tensor, "B _"] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureNetwork:
    """A network as figures need it. `compute` takes bytes of (B, H, W, 3). Any function will do, under a name and with
    a hash by which its figures are known."""

    name: str
    sha256: str
    compute: Callable[[UInt8[Tensor, "B H W 3"]], Found]
    resizer: str = "none"
    """How pictures come to the size that it takes, in words."""
    picture_size: tuple[int, int] | None = None
    """Rows and columns, if it takes no others."""

    def __call__(self, pictures: UInt8[Tensor, "B H W 3"], first: int = 0, where: Path | str = "") -> Found:
        """Raises InputError for pictures of a size that it does not take, and for features that are not finite, naming
        the picture, the batch's being `first`."""
        size = tuple(pictures.shape[1:3])
        if self.picture_size not in (None, size):
            assert self.picture_size is not None
            raise InputError(
                f"{where}: pictures are of {size[0]}×{size[1]}, the {self.name} takes "
                f"{self.picture_size[0]}×{self.picture_size[1]} (rows × columns): resize them, or take other features."
            )
        with torch.inference_mode(), _whole_float32():
            pooled, *others = self.compute(pictures)
            found = Found(pooled.float().cpu(), *(None if part is None else part.float().cpu() for part in others))
        for part in found:
            if part is not None and not (finite := part.isfinite().all(1)).all():
                bad = first + int((~finite).nonzero()[0, 0])
                raise InputError(
                    f"{where}: the {self.name} makes NaN or infinity of picture {bad}; its weights may be damaged, or "
                    "of another network."
                )
        return found


@contextmanager
def _whole_float32() -> Iterator[None]:
    """On a GPU, convolutions are otherwise computed in TF32, with 10 bits of the mantissa."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _images(pictures: UInt8[Tensor, "B H W 3"], device: torch.device | str) -> UInt8[Tensor, "B 3 H W"]:
    return pictures.permute(0, 3, 1, 2).contiguous().to(device)


def inception_features(network: Inception, sha256: str, resizer: str) -> FeatureNetwork:
    device = choose_device()
    network = network.to(device)
    return FeatureNetwork(
        name=INCEPTION,
        sha256=sha256,
        resizer=f"{resizer} to 299×299",
        compute=lambda pictures: Found(*network(resized(_images(pictures, device), resizer))),
    )


def judge_features(judge: Judge) -> FeatureNetwork:
    device = choose_device()
    judge = judge.eval().to(device)

    def compute(pictures: UInt8[Tensor, "B H W 3"]) -> Found:
        features, logits = judge(_images(pictures, device).float() / 255)
        return Found(features, None, logits)

    return FeatureNetwork(name=JUDGE, sha256=weights_sha256(judge), compute=compute)


def tokenizer_features(image_tokenizer: Any, picture_size: tuple[int, int]) -> FeatureNetwork:
    device = choose_device()
    image_tokenizer = image_tokenizer.eval().to(device)

    def compute(pictures: UInt8[Tensor, "B H W 3"]) -> Found:
        codes = image_tokenizer.encode_images(_images(pictures, device).float() / 255)
        latents = image_tokenizer.quantizer.lookup(codes).permute(0, 3, 1, 2).float()  # (B, E, h, w)
        rows, columns = (min(4, side) for side in latents.shape[2:])
        return Found(F.adaptive_avg_pool2d(latents, (rows, columns)).flatten(1))

    return FeatureNetwork(
        name=TOKENIZER, sha256=weights_sha256(image_tokenizer), compute=compute, picture_size=picture_size
    )


def train_judge_of(path: Path | str, *, seed: int = 0, num_steps: int = 600, show_progress: bool = True) -> Judge:
    """A judge of the classes at a path: of MNIST's folder, its training digits. Raises InputError for pictures without
    classes."""
    found = open_labelled(Path(path))
    labelled: Labelled = found["train"] if isinstance(found, dict) else found
    first = labelled.picture(0)
    chosen = np.random.default_rng([seed, 0]).permutation(len(labelled))[:MOST_TRAINING]
    images = labelled.images(chosen.tolist(), (first.height, first.width))
    labels, num_classes = labelled.labels[chosen], len(labelled.names)
    return train_judge(images, labels, num_classes, num_steps=num_steps, seed=seed, show_progress=show_progress)


def save_judge(judge: Judge, path: Path, *, force: bool = False) -> None:
    with new_file(path, force=force) as temporary:
        safetensors.torch.save_file({name: t.contiguous() for name, t in judge.state_dict().items()}, temporary)


def open_network(path: Path, protocol: Protocol, *, sha256: str | None = None) -> FeatureNetwork:
    """The network of a weight file or of a folder. `sha256` is what its hash must begin with. Raises InputError saying
    what the file is not, and ValueError for a protocol that has no resizer for Inception."""
    if path.is_dir():
        return _folder_features(path, sha256)
    tensors = read_weights(path).tensors
    found = file_sha256(path)
    if sha256 is not None and not found.startswith(sha256.lower()):
        raise InputError(
            f"{path} has the SHA-256 {found}, expected {sha256}: figures of other weights do not compare; take the "
            "file that was used before, or leave the hash out."
        )
    if MARK in tensors:
        if protocol.resizer == "none":
            raise ValueError(
                f"the protocol {protocol.name} does not say how pictures are resized for Inception; choose adm, "
                "torch-fidelity, clean-fid or pytorch-fid."
            )
        return inception_features(Inception.load(path), found, protocol.resizer)
    if JUDGE_MARK in tensors and "head.weight" in tensors:
        judge = Judge(tensors["head.weight"].shape[0])
        load_strictly(judge, tensors, path, "a judge (smalti evaluate judge)")
        return judge_features(judge)
    if "features.0.weight" in tensors and "features.28.weight" in tensors:
        return _vgg_features(path, tensors, found)
    if any(name.startswith(("stem.", "features.0.0.")) for name in tensors):
        return _convnext_features(path, found)
    has = ", ".join(list(tensors)[:4])
    raise InputError(
        f"{path} holds the weights of no network that is known here (its keys begin with {has}); give FID's Inception "
        "(pt_inception-2015-12-05), torchvision's VGG16 or ConvNeXt-S, a judge, or a folder of CLIP or DINOv2."
    )


def _vgg_features(path: Path, tensors: dict[str, Tensor], sha256: str) -> FeatureNetwork:
    """Means over places of the last layer that LPIPS compares: 512 numbers."""
    network, device = LPIPS(), choose_device()
    trunk = {name.removeprefix("features."): t for name, t in tensors.items() if not name.startswith("classifier.")}
    load_strictly(network.features, trunk, path, "torchvision's vgg16")
    network = network.to(device)

    def compute(pictures: UInt8[Tensor, "B H W 3"]) -> Found:
        images = F.interpolate(
            _images(pictures, device).float() / 255,
            size=(224, 224),
            mode="bicubic",
            antialias=True,
            align_corners=False,
        )
        return Found(network.taps(images.clamp(0, 1))[len(VGG16_TAPS) - 1].mean((2, 3)))

    return FeatureNetwork(name="vgg16", sha256=sha256, compute=compute, resizer="bicubic, antialiased, to 224×224")


def _convnext_features(path: Path, sha256: str) -> FeatureNetwork:
    network, device = ConvNeXtDistance.load(path), choose_device()
    network = network.to(device)

    def compute(pictures: UInt8[Tensor, "B H W 3"]) -> Found:
        logits = network.logits(_images(pictures, device).float() / 255)
        return Found(logits, None, logits)

    return FeatureNetwork(name="convnext", sha256=sha256, compute=compute, resizer="bilinear, antialiased, to 224×224")


MODEL_TYPES = ("clip", "clip_vision_model", "dinov2")


def _folder_features(folder: Path, sha256: str | None) -> FeatureNetwork:
    """The embedding of a CLIP, or the class token of a DINOv2, from a folder as they are published."""
    config = read_json(
        folder / "config.json", "give a folder with config.json, model.safetensors and preprocessor_config.json"
    )
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise InputError(f"{folder}: model_type is {kind!r}; known are {', '.join(MODEL_TYPES)}.")
    if not (folder / "model.safetensors").is_file():
        raise InputError(f"{folder} has no model.safetensors; other forms of weights may run code and are not read.")
    found = file_sha256(folder / "model.safetensors")
    if sha256 is not None and not found.startswith(sha256.lower()):
        raise InputError(f"{folder}/model.safetensors has the SHA-256 {found}, expected {sha256}.")
    try:
        from transformers import AutoModel, CLIPVisionModelWithProjection
    except ImportError as error:
        raise InputError(
            "CLIP and DINOv2 need transformers, which is in an extra: pip install 'smalti[t5]'."
        ) from error
    how: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False}
    network: Any = (AutoModel if kind == "dinov2" else CLIPVisionModelWithProjection).from_pretrained(folder, **how)
    device = choose_device()
    network = network.eval().to(device)
    side, mean, std = _preprocessing(folder, config)
    mean, std = mean.to(device), std.to(device)

    def compute(pictures: UInt8[Tensor, "B H W 3"]) -> Found:
        images = _images(pictures, device).float() / 255
        images = F.interpolate(images, size=(side, side), mode="bicubic", antialias=True, align_corners=False)
        given: Any = network(pixel_values=(images.clamp(0, 1) - mean) / std)
        return Found(given.pooler_output if kind == "dinov2" else given.image_embeds)

    return FeatureNetwork(
        name="dinov2" if kind == "dinov2" else "clip",
        sha256=found,
        compute=compute,
        resizer=f"bicubic, antialiased, to {side}×{side}, not cropped",
    )


def _preprocessing(folder: Path, config: dict[str, Any]) -> tuple[int, Tensor, Tensor]:
    """Side, mean and deviation of the pictures that the network takes."""
    said = read_json(folder / "preprocessor_config.json", "it is published with the model")
    vision = config.get("vision_config", config)
    crop = said.get("crop_size", said.get("size", {}))
    side = crop.get("height", crop.get("shortest_edge")) if isinstance(crop, dict) else crop
    side = side or vision.get("image_size")
    numbers = [said.get("image_mean"), said.get("image_std")]
    if not isinstance(side, int) or any(not isinstance(n, list) or len(n) != 3 for n in numbers):
        raise InputError(f"{folder}/preprocessor_config.json does not say crop_size, image_mean and image_std.")
    mean, std = (torch.tensor(n, dtype=torch.float32).view(3, 1, 1) for n in numbers)
    return side, mean, std
