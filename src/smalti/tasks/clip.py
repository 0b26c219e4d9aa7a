"""CLIP of `transformers`, where the user has one: how well a caption and a picture fit (arXiv:2103.00020). Needs the
extra "t5", which brings transformers; nothing is fetched.

Letters: B pairs.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from smalti.errors import InputError, first_line


class Clip:
    """A CLIP model and its processor, from the folder that `save_pretrained` wrote. Raises InputError naming the folder
    if there is none, or without transformers."""

    def __init__(self, folder: Path | str):
        try:
            from transformers import CLIPModel, CLIPProcessor
        except ImportError as error:
            raise InputError("reranking by CLIP needs the package transformers: pip install 'smalti[t5]'.") from error
        try:
            loaded: Any = CLIPModel.from_pretrained(str(folder), local_files_only=True)
            self.model: Any = loaded.eval()
            self.processor: Any = CLIPProcessor.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # the library raises whatever its parts do
            raise InputError(
                f"{folder} holds no CLIP model that transformers reads ({first_line(error)}); give a folder with "
                "config.json, model.safetensors, and the files of its tokenizer and image processor."
            ) from error

    @torch.no_grad()
    def fit(self, pictures: Sequence[Image.Image], captions: Sequence[str]) -> Float[Tensor, " B"]:
        """The cosine of each picture and its caption."""
        inputs = self.processor(
            text=list(captions), images=list(pictures), return_tensors="pt", padding=True, truncation=True
        )
        found = self.model(**inputs)
        return (found.text_embeds * found.image_embeds).sum(-1).float()
