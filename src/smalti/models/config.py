"""Shapes and kinds of transformers, and the published ones by name."""

from dataclasses import dataclass
from typing import Any

from smalti.bounds import MAX_TABLE, check_sizes

NORMS = ("layer", "rms")
FEED_FORWARDS = ("gelu", "gelu_tanh", "relu", "tanh", "swiglu", "geglu")
POSITIONS = ("learned", "sinusoidal", "rotary", "rotary_2d", "none")


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Shape and kind of a transformer. Raises ValueError where the numbers do not fit together."""

    num_layers: int
    d_model: int
    num_heads: int
    d_ff: int
    max_length: int
    """Most tokens in a sequence, the prefix included."""
    num_kv_heads: int | None = None
    """Key-value heads, each shared by num_heads / num_kv_heads query heads (arXiv:2305.13245); None: one each."""
    head_width: int | None = None
    """Channels of a head; None: d_model / num_heads."""
    norm: str = "layer"
    norm_eps: float = 1e-5
    feed_forward: str = "gelu"
    bias: bool = True
    """Biases in the linear layers."""
    positions: str = "learned"
    rotary_base: float = 10000.0
    grid: tuple[int, int] | None = None
    """Rows and columns of the picture, for 2-D rotary positions."""
    prefix_length: int = 0
    """Tokens before the picture; under 2-D rotary positions they are not rotated."""
    zero_prefix_rotation: bool = False
    """LlamaGen's released weights multiply queries and keys of the prefix by zero instead (LlamaGen issue 54)."""
    qk_norm: bool = False
    normformer: bool = False
    """A norm behind each attention, and between the matrices of the feed-forward (arXiv:2110.09456)."""
    causal: bool = True
    cross_attention: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0

    def __post_init__(self) -> None:
        check_sizes(self, "num_layers")
        _one_of("norm", self.norm, NORMS)
        _one_of("feed_forward", self.feed_forward, FEED_FORWARDS)
        _one_of("positions", self.positions, POSITIONS)
        for name in ("num_layers", "d_model", "num_heads", "d_ff", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.head_width is None and self.d_model % self.num_heads:
            raise ValueError(f"d_model {self.d_model} is not divisible by num_heads {self.num_heads}.")
        if self.head_width is not None and self.head_width < 1:
            raise ValueError(
                f"head_width is {self.head_width}; it must be at least 1, or None for d_model / num_heads."
            )
        if self.num_kv_heads is not None and self.num_kv_heads < 1:
            raise ValueError(f"num_kv_heads is {self.num_kv_heads}; it must be at least 1, or None for one per head.")
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not divisible by num_kv_heads {self.kv_heads}.")
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head width, not {self.head_dim}.")
        if self.positions == "rotary_2d":
            self._check_2d()
        self._check_table()
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a share in [0, 1).")

    def _check_table(self) -> None:
        """Of positions that are computed, all at once; the learned ones are weights."""
        length, width = self.max_length, self.d_model if self.positions == "sinusoidal" else self.head_dim
        if self.grid is not None:
            length = max(length, self.prefix_length + self.grid[0] * self.grid[1])
        if self.positions not in ("none", "learned") and length * width > MAX_TABLE:
            raise ValueError(
                f"the table of {self.positions} positions would have {length} rows of {width} numbers; at most "
                f"{MAX_TABLE // width} rows are possible: is max_length, or grid, right?"
            )

    def _check_2d(self) -> None:
        if self.head_dim % 4:
            raise ValueError(f"2-D rotary positions need a head width divisible by 4, not {self.head_dim}.")
        if self.grid is None:
            raise ValueError("2-D rotary positions need grid=(rows, columns).")
        if min(self.grid) < 1 or self.prefix_length < 0:
            raise ValueError(
                f"grid is {self.grid} and prefix_length {self.prefix_length}; "
                "expected at least 1 row and 1 column, and no negative prefix."
            )
        cells = self.prefix_length + self.grid[0] * self.grid[1]
        if cells < self.max_length:
            raise ValueError(
                f"max_length {self.max_length} exceeds prefix_length + the grid's cells, "
                f"{self.prefix_length} + {self.grid[0]} × {self.grid[1]} = {cells}."
            )

    @property
    def head_dim(self) -> int:
        return self.d_model // self.num_heads if self.head_width is None else self.head_width

    @property
    def q_width(self) -> int:
        """Channels of all query heads together: d_model, unless `head_width` says otherwise."""
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Channels of all keys, and of all values."""
        return self.kv_heads * self.head_dim

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads


GPT = dict(norm="layer", feed_forward="gelu", bias=True, positions="learned")
LLAMA = dict(norm="rms", feed_forward="swiglu", bias=False, positions="rotary")
LLAMAGEN = LLAMA | dict(positions="rotary_2d")

PRESETS: dict[str, dict[str, Any]] = {
    # Berkeley CS294-158 (spring 2024), homework 1, question 6. 800,768 parameters with 58 positions
    # and a head with rows for all ids; `new_model` leaves out the one of <bos>.
    "digits": GPT | dict(num_layers=4, d_model=128, num_heads=4, d_ff=512),
    # LlamaGen (arXiv:2406.06525), autoregressive/models/gpt.py. Parameters of the class-conditional models, embeddings
    # and head (16,384 codes, 1,001 classes) included; `grid` and `prefix_length` are given with the length.
    "llamagen-b": LLAMAGEN | dict(num_layers=12, d_model=768, num_heads=12, d_ff=2048),  # 110,888,448
    "llamagen-l": LLAMAGEN | dict(num_layers=24, d_model=1024, num_heads=16, d_ff=2816),  # 342,910,976
    "llamagen-xl": LLAMAGEN | dict(num_layers=36, d_model=1280, num_heads=20, d_ff=3584),  # 774,699,520
    "llamagen-xxl": LLAMAGEN | dict(num_layers=48, d_model=1536, num_heads=24, d_ff=4096),  # 1,410,972,672
    "llamagen-xxxl": LLAMAGEN | dict(num_layers=48, d_model=2560, num_heads=40, d_ff=6912),  # 3,893,027,840
    "llamagen-1b": LLAMAGEN | dict(num_layers=22, d_model=2048, num_heads=32, d_ff=5632),  # 1,199,616,000
    "llamagen-3b": LLAMAGEN | dict(num_layers=24, d_model=3200, num_heads=32, d_ff=8704),  # 3,096,659,200
    "llamagen-7b": LLAMAGEN | dict(num_layers=32, d_model=4096, num_heads=32, d_ff=11008),  # 6,614,589,440
    # Llama (arXiv:2302.13971) in sizes for pictures from captions. Parameters with the 30,000 ids of the CC3M data
    # set's card, all with rows in the head: embeddings and head, 60,000 × d_model, are most of the small ones. Where
    # captions are only given, as in the recipe cc3m, the head has 4,096 rows, and llama-20m 15,155,456 parameters.
    "llama-5m": LLAMA | dict(num_layers=4, d_model=80, num_heads=5, d_ff=216),  # 5,110,480
    "llama-20m": LLAMA | dict(num_layers=8, d_model=256, num_heads=8, d_ff=704),  # 21,786,880
    "llama-60m": LLAMA | dict(num_layers=10, d_model=512, num_heads=8, d_ff=1408),  # 62,843,392
    "llama-130m": LLAMA | dict(num_layers=12, d_model=768, num_heads=12, d_ff=2048),  # 131,033,856
    "llama-350m": LLAMA | dict(num_layers=22, d_model=1024, num_heads=16, d_ff=2816),  # 344,077,312
    "llama-1b": LLAMA | dict(num_layers=18, d_model=2048, num_heads=16, d_ff=5632),  # 1,047,799,808
}


def preset_config(name: str, *, max_length: int, **changes: Any) -> TransformerConfig:
    """A preset for up to `max_length` tokens, with some fields changed. Raises ValueError for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"transformer preset {name!r} is unknown; choose one of {', '.join(PRESETS)}.")
    return TransformerConfig(max_length=max_length, **(PRESETS[name] | changes))


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} {value!r} is unknown; choose one of {', '.join(known)}.")
