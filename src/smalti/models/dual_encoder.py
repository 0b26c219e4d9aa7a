"""A contrastive dual encoder: how well a caption and a picture's codes fit, as one number (CLIP, arXiv:2103.00020, on
codes instead of pixels).

The text tower has the names and shapes of an `EncoderDecoder`'s encoder. Trained with masked text beside the
contrastive loss, as Parti's encoder is before it meets a decoder (arXiv:2206.10789, §2.3), it can begin one
(`lend_encoder`); the whole ranks candidates, as the paper does with a CoCa (§2.4).

Letters: B batch, S ids of a caption with its marker, L codes of a picture, D model width, E width of what is compared,
V ids of text.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from smalti.bounds import MAX_CELLS, check_sizes
from smalti.documents import config_of
from smalti.models.config import TransformerConfig
from smalti.models.encoder_decoder import EncoderDecoder
from smalti.models.transformer import Transformer

FIRST_TEMPERATURE = 0.07
LARGEST_SCALE = 100.0
"""Of the learned inverse temperature (CLIP, §2.5)."""


@dataclass(frozen=True, kw_only=True)
class DualEncoderConfig:
    """Sizes of two towers. Raises ValueError where they do not fit together."""

    text_size: int
    max_text: int
    codebook_size: int
    grid: tuple[int, int]
    text_layers: int
    picture_layers: int
    d_model: int
    num_heads: int
    d_ff: int
    embedding_width: int = 128
    """Channels of what is compared."""
    feed_forward: str = "relu"
    bias: bool = False
    dropout: float = 0.1

    def __post_init__(self) -> None:
        check_sizes(self, "text_layers", "picture_layers")
        for name in ("text_size", "max_text", "codebook_size", "text_layers", "picture_layers", "embedding_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if min(self.grid) < 1 or self.num_codes > MAX_CELLS:
            raise ValueError(f"grid is {self.grid}; expected rows and columns, at least 1 each.")
        _ = self.text, self.pictures

    @property
    def num_codes(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def text(self) -> TransformerConfig:
        return self._transformer(self.text_layers, self.max_text + 1)

    @property
    def pictures(self) -> TransformerConfig:
        return self._transformer(self.picture_layers, self.num_codes)

    def _transformer(self, num_layers: int, max_length: int) -> TransformerConfig:
        return TransformerConfig(
            num_layers=num_layers,
            d_model=self.d_model,
            num_heads=self.num_heads,
            d_ff=self.d_ff,
            max_length=max_length,
            feed_forward=self.feed_forward,
            bias=self.bias,
            positions="none",
            causal=False,
            dropout=self.dropout,
        )

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: object, where: Path | str = "the reranker's config") -> "DualEncoderConfig":
        """The config that `to_dict` gave. Raises InputError naming `where` and the field that is not as it must be."""
        return config_of(cls, content, where)


class DualEncoder(nn.Module):
    """Captions and pictures as vectors of one length; their product is the larger the better they fit."""

    def __init__(self, config: DualEncoderConfig):
        super().__init__()
        self.config = config
        D, (rows, columns) = config.d_model, config.grid
        self.embed_text = nn.Embedding(config.text_size + 1, D)
        """The last row is `<eot>`'s."""
        self.text_positions = nn.Embedding(config.max_text + 1, D)
        self.encoder = Transformer(config.text)
        self.masked = nn.Parameter(torch.zeros(D))
        """What stands in place of a hidden id."""
        self.embed_codes = nn.Embedding(config.codebook_size, D)
        self.row_positions, self.column_positions = nn.Embedding(rows, D), nn.Embedding(columns, D)
        self.picture_encoder = Transformer(config.pictures)
        self.text_out = nn.Linear(D, config.embedding_width, bias=False)
        self.picture_out = nn.Linear(D, config.embedding_width, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(FIRST_TEMPERATURE)))
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    @property
    def scale(self) -> Tensor:
        return self.log_scale.exp().clamp(max=LARGEST_SCALE)

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def device(self) -> torch.device:
        return self.embed_codes.weight.device

    def read_text(
        self, text: Int[Tensor, "B S"], lengths: Int[Tensor, " B"], hidden: Bool[Tensor, "B S"] | None = None
    ) -> Float[Tensor, "B S D"]:
        """What the encoder makes of captions with their `<eot>`, of which the first `lengths` ids are real; where
        `hidden` is true it is not shown the id."""
        real = torch.arange(text.shape[1], device=text.device) < lengths[:, None]
        x = self.embed_text(text.where(real, self.config.text_size))
        if hidden is not None:
            x = torch.where(hidden[..., None], self.masked, x)
        return self.encoder(x + self.text_positions.weight[: text.shape[1]], mask=real[:, None, None])

    def of_text(self, encoded: Float[Tensor, "B S D"], lengths: Int[Tensor, " B"]) -> Float[Tensor, "B E"]:
        """Captions as vectors of length 1: what stands at their `<eot>`."""
        last = encoded[torch.arange(len(encoded), device=encoded.device), lengths - 1]
        return F.normalize(self.text_out(last), dim=-1)

    def of_pictures(self, codes: Int[Tensor, "B L"]) -> Float[Tensor, "B E"]:
        """Pictures as vectors of length 1: the mean over their codes."""
        places = (self.row_positions.weight[:, None] + self.column_positions.weight).flatten(0, 1)
        return F.normalize(self.picture_out(self.picture_encoder(self.embed_codes(codes) + places).mean(1)), dim=-1)

    def unmask(self, encoded: Float[Tensor, "... D"]) -> Float[Tensor, "... V"]:
        """Scores of the ids that were hidden."""
        return F.linear(encoded, self.embed_text.weight[:-1])

    def with_end(self, texts: Sequence[Int[Tensor, " L"]]) -> tuple[Int[Tensor, "B S"], Int[Tensor, " B"]]:
        """Captions' ids with `<eot>` behind them, filled up, and how many of each row are real. Raises ValueError for
        one that is too long."""
        longest = max(map(len, texts), default=0)
        if longest > self.config.max_text:
            raise ValueError(f"a caption has {longest} ids; the dual encoder reads {self.config.max_text}.")
        ended = [F.pad(text, (0, 1), value=self.config.text_size) for text in texts]
        lengths = torch.tensor([len(text) for text in ended])
        return nn.utils.rnn.pad_sequence(ended, batch_first=True).to(self.device), lengths.to(self.device)

    @torch.no_grad()
    def fit(self, codes: Int[Tensor, "B L"], texts: Sequence[Int[Tensor, " L"]]) -> Float[Tensor, " B"]:
        """How well each picture's codes and its caption fit: the cosine of their vectors."""
        text, lengths = self.with_end(texts)
        vectors = self.of_text(self.read_text(text, lengths), lengths)
        return (vectors * self.of_pictures(codes.to(self.device))).sum(-1).cpu()


def lend_encoder(dual: DualEncoder, model: EncoderDecoder) -> None:
    """Gives a fresh encoder-decoder the text encoder of a dual encoder. Raises ValueError if it has another shape."""
    for name in ("embed_text", "text_positions", "encoder"):
        theirs, ours = getattr(dual, name).state_dict(), getattr(model, name)
        wanted = {key: tuple(tensor.shape) for key, tensor in ours.state_dict().items()}
        if wanted != {key: tuple(tensor.shape) for key, tensor in theirs.items()}:
            raise ValueError(
                f"the dual encoder's {name} has another shape than the model's: give it as many layers, heads and "
                "channels, and the same text."
            )
        ours.load_state_dict(theirs)
