"""What every face of a bundle has: the bundle by name, loaded and saved."""

from pathlib import Path
from typing import Self

import torch

from smalti.bundle import Bundle


class Face:
    """A bundle as people use it. Each kind of bundle has a face of its own, which adds what can be done with it."""

    def __init__(self, bundle: Bundle):
        self.bundle, self.model, self.layout = bundle, bundle.model, bundle.layout

    @classmethod
    def load(
        cls, name: str | Path, *, device: torch.device | str = "auto", dtype: str = "auto", weights: str = "float32"
    ) -> Self:
        """A bundle from its folder, by the name of one that ships, or by a hub's `owner/name` (see `Bundle.load`)."""
        return cls(Bundle.load(name, device=device, dtype=dtype, weights=weights))

    @property
    def name(self) -> str:
        return self.bundle.name

    @property
    def weights_sha256(self) -> str:
        """What receipts know the bundle by."""
        return self.bundle.weights_sha256

    def save(self, directory: Path | str, *, half: bool = False, force: bool = False) -> None:
        """Writes the bundle as a folder (see `Bundle.save`)."""
        self.bundle.save(directory, half=half, force=force)
