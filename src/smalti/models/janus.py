"""Janus: pictures drawn by a language model that has an embedding and a head of their own for picture codes
(arXiv:2410.13848, arXiv:2501.17811; deepseek-ai/Janus, janus/models/modeling_vlm.py).

Its sequences are `(text{..n}) <begin_of_image> image{L}`, in which the marker is one of the text's own ids. A code's
embedding, E wide, reaches the transformer's width through an MLP, the aligner; the head for codes is an MLP too. Text
is read, not written, and pictures are drawn, not looked at: the language model's head for text and the vision encoder
are left out.

Letters: B batch, R rows of a state, T tokens, D model width, E code width, H head width, n the ids of a slot.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from smalti.bounds import check_sizes
from smalti.documents import config_of
from smalti.models.base import Inputs, check_drawable, check_own_layout, inputs_of, last_of
from smalti.models.config import TransformerConfig
from smalti.models.decode_state import DecodeState, Rows
from smalti.models.stored_weights import StoredLinear, StoredWeight, check_storable, storage_of, store_linears
from smalti.models.transformer import Transformer
from smalti.sequences.layout import Layout, Slot
from smalti.sequences.request import TokenSequence
from smalti.sequences.vocabulary import SPECIAL, Vocabulary

START = "<begin_of_image>"
ORDER = "text to image"


@dataclass(frozen=True, kw_only=True)
class JanusConfig:
    """Sizes of a Janus. Raises ValueError where they do not fit together."""

    text_size: int
    """Ids of text, of which `start_id` is one."""
    start_id: int
    """The id of text that stands before every picture."""
    codebook_size: int
    code_dim: int
    """Channels of a code's embedding, E."""
    num_codes: int
    """Codes of a picture, in a square grid."""
    max_text: int
    """Most ids of text before the picture. The transformer may take more; keys and values are set aside for these."""
    head_width: int
    """Channels within the head for codes, H."""
    aligner_depth: int = 2
    """Linear layers of the aligner."""
    transformer: TransformerConfig

    def __post_init__(self) -> None:
        check_sizes(self)
        for name in ("text_size", "codebook_size", "code_dim", "num_codes", "max_text", "head_width", "aligner_depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if not 0 <= self.start_id < self.text_size:
            raise ValueError(f"start_id is {self.start_id}; expected an id of text, 0..{self.text_size - 1}.")
        if not self.transformer.causal or self.transformer.cross_attention:
            raise ValueError("a Janus needs a transformer with causal=True and cross_attention=False.")
        if self.layout.max_length > self.transformer.max_length:
            raise ValueError(
                f"{self.max_text} ids of text, the marker and {self.num_codes} codes are {self.layout.max_length} "
                f"tokens; the transformer takes {self.transformer.max_length}."
            )

    @property
    def layout(self) -> Layout:
        """What its sequences are made of."""
        sizes = {"text": self.text_size, SPECIAL: [START], "image": self.codebook_size}
        line = f"(text{{..{self.max_text}}}) {START} image{{{self.num_codes}}}"
        return Layout.parse(Vocabulary(sizes), {ORDER: line})

    @property
    def first_code(self) -> int:
        """The token id of code 0: text and the marker come before."""
        return self.text_size + 1

    @property
    def vocab_size(self) -> int:
        return self.first_code + self.codebook_size

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: object, where: Path | str = "the model's config") -> "JanusConfig":
        """The config that `to_dict` gave. Raises InputError naming `where` and the field that is not as it must be."""
        return config_of(cls, content, where)


def _published(num_layers: int, d_model: int, num_heads: int, d_ff: int) -> JanusConfig:
    return JanusConfig(
        text_size=102_400,
        start_id=100_016,
        codebook_size=16_384,
        code_dim=8,
        num_codes=576,
        max_text=447,
        head_width=d_model,
        transformer=TransformerConfig(
            num_layers=num_layers,
            d_model=d_model,
            num_heads=num_heads,
            d_ff=d_ff,
            max_length=16_384,
            norm="rms",
            norm_eps=1e-6,
            feed_forward="swiglu",
            bias=False,
            positions="rotary",
        ),
    )


PRESETS = {
    # Janus-Pro's config.json files; parameters of what draws pictures, without the head for text (102,400 × d_model).
    "janus-pro-1b": _published(24, 2048, 16, 5632),  # 1,485,053,952
    "janus-pro-7b": _published(30, 4096, 32, 11008),  # 6,591,791,104
}


class Aligner(nn.Module):
    """Embeddings of codes to the transformer's width."""

    def __init__(self, code_dim: int, d_model: int, depth: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(code_dim if i == 0 else d_model, d_model) for i in range(depth))

    def forward(self, x: Float[Tensor, "... E"]) -> Float[Tensor, "... D"]:
        for number, layer in enumerate(self.layers):
            x = layer(F.gelu(x) if number else x)
        return x


class CodeHead(nn.Module):
    """Scores of codes from hidden states."""

    def __init__(self, d_model: int, width: int, codebook_size: int):
        super().__init__()
        self.first = nn.Linear(d_model, width)
        self.second = nn.Linear(width, codebook_size)

    def forward(self, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... K"]:
        return self.second(F.gelu(self.first(hidden)))


class Janus(nn.Module):
    """p(code | the text, the codes before it)."""

    def __init__(self, config: JanusConfig):
        super().__init__()
        self.config = config
        D = config.transformer.d_model
        self.embed_tokens = nn.Embedding(config.text_size, D)
        self.embed_codes = nn.Embedding(config.codebook_size, config.code_dim)
        self.aligner = Aligner(config.code_dim, D, config.aligner_depth)
        self.transformer = Transformer(config.transformer)
        self.head = CodeHead(D, config.head_width, config.codebook_size)
        for part in (self.embed_tokens, self.embed_codes, self.aligner, self.head):
            part.apply(_init_weights)

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def storage(self) -> str:
        """How the weights are stored, one of STORAGES."""
        return storage_of(self)

    def store_weights(self, storage: str) -> None:
        """Stores the matrices in fewer bits from now on, for generation and scoring alone; embeddings stay. Raises
        ValueError unless the weights are float32 and not stored yet."""
        check_storable(self, self.embed_tokens.weight.dtype, storage)
        if storage != "float32":
            self.requires_grad_(False)
            store_linears(self, storage)

    def check_layout(self, layout: Layout) -> None:
        """Raises ValueError unless the layout is the model's own."""
        check_own_layout("this Janus", self.config.layout, layout)

    def check_request(self, sequence: TokenSequence) -> None:
        check_drawable(self, sequence)

    def hidden(self, inputs: Inputs | Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """Hidden states of whole sequences; the one at position t predicts token t + 1."""
        token_ids, positions, _, features = inputs_of(inputs)
        if features is not None:
            raise ValueError("features are given; a Janus reads token ids alone.")
        return self.transformer(self._embedded(token_ids), positions=positions)

    def _embedded(self, token_ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        config = self.config
        words = self.embed_tokens(token_ids.where(token_ids < config.text_size, config.start_id))
        is_code = token_ids >= config.first_code
        codes = self.aligner(self.embed_codes((token_ids - config.first_code).clamp(min=0)))
        return torch.where(is_code[..., None], codes, words)

    def new_state(self, capacity: int, max_length: int | None = None) -> DecodeState:
        body, dtype = self.config.transformer, self.embed_tokens.weight.dtype
        longest = max_length or self.config.layout.max_length
        return DecodeState(body, capacity, longest, device=self.device, dtype=dtype)

    def extend(
        self, state: DecodeState, rows: Rows, token_ids: Int[Tensor, "R T"], counts: Sequence[int] | None = None
    ) -> Float[Tensor, "R D"]:
        return last_of(self.extend_all(state, rows, token_ids, counts), counts)

    def extend_all(
        self, state: DecodeState, rows: Rows, token_ids: Int[Tensor, "R T"], counts: Sequence[int] | None = None
    ) -> Float[Tensor, "R T D"]:
        """`extend`, returning what predicts the token behind each of the new ones."""
        return self.transformer.extend(self._embedded(token_ids), state, rows, counts)

    @property
    def stored_head(self) -> StoredWeight | None:
        """Of the head's last layer, as the next three."""
        return self.head.second.stored if isinstance(self.head.second, StoredLinear) else None

    @property
    def head_weight(self) -> Float[Tensor, "codes H"]:
        return self.head.second.weight if self.stored_head is None else self.stored_head.expanded()

    @property
    def head_bias(self) -> Float[Tensor, " codes"]:
        return self.head.second.bias

    def head_rows(self, slot: Slot) -> tuple[tuple[int, int], ...]:
        """The rows that score a slot's ids. Raises ValueError if there are none for some of them."""
        first = self.config.first_code
        if not self.can_score(slot):
            raise ValueError(
                f"a Janus scores codes alone, ids {first}..{self.vocab_size - 1}, not {slot.ranges}: what is text it "
                "was given."
            )
        return tuple((start - first, end - first) for start, end in slot.ranges)

    def can_score(self, slot: Slot) -> bool:
        return all(self.config.first_code <= start and end <= self.vocab_size for start, end in slot.ranges)

    def logits(self, hidden: Float[Tensor, "... D"], slot: Slot | None = None) -> Float[Tensor, "... n"]:
        scores = self.head(hidden)
        if slot is None:
            return F.pad(scores, (self.config.first_code, 0), value=-torch.inf)
        rows = self.head_rows(slot)
        if slot.size == self.config.codebook_size:
            return scores
        return torch.cat([scores[..., start:end] for start, end in rows], dim=-1)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
