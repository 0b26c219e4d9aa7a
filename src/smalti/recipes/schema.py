"""What a recipe says: its sections are the config dataclasses themselves, so their fields, ranges and defaults are
written down once, where they are used; this file only says which sections there are."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from smalti.bundle import Sampling
from smalti.data.digits import ColouringConfig
from smalti.data.picture_sets import PicturesConfig
from smalti.data.scene_tables import ScenesConfig
from smalti.evaluate.captions import CaptionsReportConfig
from smalti.evaluate.classes import ClassesReportConfig
from smalti.evaluate.compositions import CompositionsConfig
from smalti.evaluate.prompts import PromptsConfig
from smalti.evaluate.report import ReportConfig
from smalti.image_tokenizers.losses import AdversarialConfig, LossConfig
from smalti.image_tokenizers.titok import TiTokConfig
from smalti.image_tokenizers.vit_vqgan import ViTVQGANConfig
from smalti.image_tokenizers.vqgan import VQGANConfig
from smalti.image_tokenizers.vqvae import VQVAEConfig
from smalti.models.config import TransformerConfig
from smalti.models.encoder_decoder import EncoderDecoderConfig, preset_config
from smalti.recipes.line_presets import AUTO, choose_preset
from smalti.sequences.layout import Layout
from smalti.sequences.vocabulary import SPECIAL, Vocabulary
from smalti.tasks.sample_table import SampleTableConfig
from smalti.text_features import MAX_FEATURES
from smalti.text_tokenizer import BPEConfig, UnigramConfig
from smalti.training.dual_encoder import TrainDualConfig
from smalti.training.gan_tokenizer import TrainGANTokenizerConfig
from smalti.training.image_tokenizer import TrainTokenizerConfig
from smalti.training.token_model import TrainConfig
from smalti.training.upsampler import TrainUpsamplerConfig
from smalti.upsample import UpsamplerConfig


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Minutes = dict[Literal["image tokenizer", "transformer", "report"], Annotated[float, Field(gt=0)]]
"""What the stages of a recipe take on the machine that `expects` was measured on, two cores. They hold for the recipe
as it is: a change to what is trained, or for how long, takes them back."""


class DigitsData(Section):
    """Coloured, captioned digits, made from uncoloured ones, or read from the original pickle."""

    source: Literal["scikit-learn", "mnist", "pickle"]
    path: Path | None = None
    """MNIST's folder with the four idx files, or the pickle file; scikit-learn's digits need none."""
    colouring: ColouringConfig = ColouringConfig()

    @model_validator(mode="after")
    def _has_path(self) -> "DigitsData":
        if (self.path is None) == (self.source != "scikit-learn"):
            rule = "has no path" if self.source == "scikit-learn" else "needs a path"
            raise ValueError(f'path is {self.path}, and source "{self.source}" {rule}.')
        return self


class ImageTokenizer(Section):
    family: Literal["vqvae"]
    model: VQVAEConfig = VQVAEConfig()
    train: TrainTokenizerConfig = TrainTokenizerConfig()
    path: Path | None = None
    """Folder of a trained image tokenizer to use as it is, instead of training one."""


class Orders(Section):
    """The specials, and the orders in which spans stand, in the notation of `smalti.sequences.layout`."""

    specials: tuple[str, ...]
    orders: dict[str, str | tuple[str, float]]
    """The line of each order, or the line and its weight."""

    def make(self, *, codebook_size: int, text_vocab_size: int) -> Layout:
        sizes = {SPECIAL: self.specials, "image": codebook_size, "text": text_vocab_size}
        return Layout.parse(Vocabulary(sizes), self.orders)


class Recipe(Section):
    """A checked recipe. `load_recipe` reads one."""

    system: Literal["digits"]
    description: str
    expects: str
    """What a run gives and takes: figures with the data and machine they were measured on."""
    minutes: Minutes = {}
    data: DigitsData
    image_tokenizer: ImageTokenizer
    layout: Orders
    model: TransformerConfig
    """Without `max_length`, which is that of the layout's longest sequence; `preset` names one of `PRESETS` to start
    from."""
    train: TrainConfig
    sample: Sampling = Sampling()
    evaluate: ReportConfig = ReportConfig()
    output: Path

    @model_validator(mode="after")
    def _fits_together(self) -> "Recipe":
        tokenizer = self.image_tokenizer.model
        layout = self.layout.make(codebook_size=tokenizer.codebook_size, text_vocab_size=1)
        if self.image_tokenizer.path is not None:
            return self  # its grid is known when it is loaded
        rows, columns = tokenizer.grid
        for order in layout.orders.values():
            for span in order.spans:
                if span.segment == "image" and span.length != rows * columns:
                    raise ValueError(
                        f'layout order "{order.name}" has {span}, but the image tokenizer gives {rows} × {columns} '
                        f"codes; write image{{{rows * columns}}} or change image_tokenizer.model."
                    )
        return self


class LinesModel(Section):
    preset: str = AUTO
    """A shape of `LINE_PRESETS`; "auto" picks the one that suits the number of training tokens."""
    dropout: float = 0.0

    @model_validator(mode="after")
    def _is_known(self) -> "LinesModel":
        choose_preset(self.preset, 0)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; expected a share in [0, 1).")
        return self


class LinesRecipe(Section):
    """A checked recipe of the system `lines`: pre-tokenized pictures, without captions or an image tokenizer."""

    system: Literal["lines"]
    description: str
    expects: str
    minutes: Minutes = {}
    data: Path | None = None
    """Token table of `smalti data import-lines`."""
    validation: Path | None = None
    """A second token table; training rows with the codes of one of its rows are left out. None: hold rows out."""
    held_out: float | int = 0.05
    """Rows of `data` held out where no `validation` is given: a share, or a number."""
    split_seed: int = 0
    vocab_size: int | None = None
    """Codes are below it; None: as the table says."""
    model: LinesModel = LinesModel()
    learning_rate_width: int | None = None
    """`train.learning_rate` is for models of this width; for others it is multiplied by this width over theirs, as
    muP scales it for matrices (Yang et al. 2022, arXiv:2203.03466). None: it is the same for all."""
    train: TrainConfig
    baseline_rows: int = 200_000
    """Training rows that the report's baselines are fitted to at most; they are held in memory."""
    report_rows: int = 10_000
    """Validation rows that the report measures at most."""
    output: Path

    @model_validator(mode="after")
    def _in_range(self) -> "LinesRecipe":
        for name in ("held_out", "vocab_size", "learning_rate_width", "baseline_rows", "report_rows"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name} is {value}; it must be more than 0.")
        return self


class VQGANFamily(Section):
    family: Literal["vqgan"]
    model: VQGANConfig = VQGANConfig()


class ViTVQGANFamily(Section):
    family: Literal["vit_vqgan"]
    model: ViTVQGANConfig = ViTVQGANConfig()


class TiTokFamily(Section):
    family: Literal["titok"]
    model: TiTokConfig = TiTokConfig()


class TokenizerRecipe(Section):
    """A checked recipe of the system `image tokenizer`: an image tokenizer alone, trained on real pictures."""

    system: Literal["image tokenizer"]
    description: str
    expects: str
    minutes: Minutes = {}
    pictures: Path | None = None
    """Folder of pictures, or parquet table with a column `image`."""
    held_out: Path | None = None
    """Pictures of their own to measure on. None: some of `pictures` are kept back."""
    reading: PicturesConfig = PicturesConfig()
    image_tokenizer: Annotated[VQGANFamily | ViTVQGANFamily | TiTokFamily, Field(discriminator="family")]
    losses: LossConfig = LossConfig()
    adversarial: AdversarialConfig = AdversarialConfig()
    train: TrainGANTokenizerConfig = TrainGANTokenizerConfig()
    output: Path


class UpsamplerRecipe(Section):
    """A checked recipe of the system `upsampler`: super-resolution behind a frozen image tokenizer."""

    system: Literal["upsampler"]
    description: str
    expects: str
    minutes: dict[Literal["upsampler"], Annotated[float, Field(gt=0)]] = {}
    pictures: Path | None = None
    """Folder of pictures, or parquet table with a column `image`, at least as large as what comes out."""
    held_out: Path | None = None
    """Pictures of their own to measure on. None: some of `pictures` are kept back."""
    image_tokenizer: Path | None = None
    """Whose pictures are enlarged: a folder of a trained image tokenizer, or a bundle that has one."""
    reading: PicturesConfig = PicturesConfig()
    model: UpsamplerConfig
    losses: LossConfig = LossConfig()
    adversarial: AdversarialConfig = AdversarialConfig()
    train: TrainUpsamplerConfig = TrainUpsamplerConfig()
    output: Path


class CaptionedPictures(Section):
    """Pictures with captions, as `open_pairs` finds them: parquet, webdataset shards, or a folder. Or what is tokens
    already: a table of `smalti tokenize`, or "hub:owner/name", a data set of the hub, read as a stream."""

    train: Path | None = None
    validation: Path | None = None
    size: tuple[int, int] | None = None
    """Rows and columns to which pictures are cropped and resized; None: those the image tokenizer was trained on."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do about a broken picture."""
    scale: int = 1
    """Drawn pictures are enlarged this many times."""


class CaptionsRecipe(Section):
    """A checked recipe of the system `captions`: pictures from free captions in one vocabulary."""

    system: Literal["captions"]
    description: str
    expects: str
    minutes: Minutes = {}
    data: CaptionedPictures
    image_tokenizer: Path | None = None
    """Folder of a trained image tokenizer."""
    text_tokenizer: Path | None = None
    """File of a text tokenizer, which tokens need. None: one is trained on the captions of the training pictures."""
    text_size: int
    """Pieces of words."""
    segments: tuple[str, ...]
    """Which ids come first: image, special and text in some order."""
    layout: Orders
    model: TransformerConfig
    """Without `max_length`, which is that of the layout's longest sequence; `preset` names one of `PRESETS` to start
    from."""
    begin_with: Path | None = None
    """Bundle whose weights the training begins with, of the same layout, words and shape. None: random ones."""
    train: TrainConfig
    watch: SampleTableConfig = SampleTableConfig()
    sample: Sampling = Sampling()
    evaluate: CompositionsConfig | None = None
    """Draw the compositions of `data.validation` and look for each among all true pictures; None: do not."""
    prompts: PromptsConfig | None = None
    """Draw prompts and check the pictures by reading them; None: do not."""
    about: dict[str, str] = {}
    """What the model card says of data and licence."""
    output: Path

    @model_validator(mode="after")
    def _in_range(self) -> "CaptionsRecipe":
        # the codebook's size is known when the image tokenizer is loaded
        BPEConfig(image_size=1, text_size=self.text_size, specials=self.layout.specials, order=self.segments)
        self.layout.make(codebook_size=1, text_vocab_size=1)
        return self


class PartiModel(Section):
    """A text encoder and a picture decoder: a preset of `encoder_decoder.PRESETS`, with some sizes changed."""

    preset: str
    encoder_layers: int | None = None
    decoder_layers: int | None = None
    d_model: int | None = None
    num_heads: int | None = None
    d_ff: int | None = None
    local_kernel: int | None = None
    """Rows and columns of the decoder's convolution-shaped window, odd; None: every code sees all before it."""
    bias: bool = False
    dropout: float = 0.1
    attention_dropout: float = 0.0

    @model_validator(mode="after")
    def _fits_together(self) -> "PartiModel":
        self.config(text_size=1, max_text=1, codebook_size=1, grid=(1, 1))  # known when the tokenizers are loaded
        return self

    def config(
        self, *, text_size: int, max_text: int, codebook_size: int, grid: tuple[int, int]
    ) -> EncoderDecoderConfig:
        changes = self.model_dump(exclude={"preset"}, exclude_none=True)
        return preset_config(
            self.preset, text_size=text_size, max_text=max_text, codebook_size=codebook_size, grid=grid, **changes
        )


class DualEncoderModel(Section):
    """A dual encoder of captions and codes. Its text tower has the sizes of the model's text encoder."""

    picture_layers: int = 3
    embedding_width: int = 128
    dropout: float = 0.1


class Reranker(Section):
    """A dual encoder that is trained beside the model and ranks candidates."""

    model: DualEncoderModel = DualEncoderModel()
    train: TrainDualConfig = TrainDualConfig()
    lends_encoder: bool = False
    """Begin the model with the dual encoder's text encoder, as Parti's pretraining does; `train.masked_weight` 1 gives
    it masked text beside the contrastive loss."""


class PartiRecipe(Section):
    """A checked recipe of the system `parti`: pictures from captions by a text encoder and a picture decoder."""

    system: Literal["parti"]
    description: str
    expects: str
    minutes: Minutes = {}
    data: CaptionedPictures
    image_tokenizer: Path | None = None
    """Folder of a trained image tokenizer, or a bundle that has one."""
    text_tokenizer: Path | None = None
    """File of a text tokenizer, which tokens need. None: one is trained on the captions of the training pictures."""
    text_size: int = 16_000
    """Pieces of words, where they are learned."""
    max_text: int = 128
    """Pieces of a caption that are read at most."""
    model: PartiModel
    reranker: Reranker | None = None
    """None: candidates are ranked by the model's own likelihoods alone."""
    train: TrainConfig
    watch: SampleTableConfig = SampleTableConfig()
    sample: Sampling = Sampling()
    evaluate: CompositionsConfig | None = None
    """Draw the compositions of `data.validation` and look for each among all true pictures; None: do not."""
    prompts: PromptsConfig | None = None
    """Draw prompts and check the pictures by reading them; None: do not."""
    about: dict[str, str] = {}
    """What the model card says of data and licence."""
    output: Path

    @model_validator(mode="after")
    def _in_range(self) -> "PartiRecipe":
        UnigramConfig(text_size=self.text_size)
        self.model.config(text_size=1, max_text=self.max_text, codebook_size=1, grid=(1, 1))
        return self


class OfScenes(Section):
    """What recipes of scenes have in common: a grammar's pictures and captions, and an image tokenizer for them."""

    description: str
    expects: str
    minutes: Minutes = {}
    data: ScenesConfig = ScenesConfig()
    tokenizer_pictures: int = Field(default=20_000, ge=1)
    """Training scenes that the image tokenizer learns from at most; they are held in memory."""
    image_tokenizer: ImageTokenizer
    text_size: int
    """Pieces of words."""
    train: TrainConfig
    watch: SampleTableConfig = SampleTableConfig()
    sample: Sampling = Sampling()
    evaluate: PromptsConfig = PromptsConfig()
    about: dict[str, str] = {}
    """What the model card says of data and licence."""
    output: Path


class ScenesRecipe(OfScenes):
    """A checked recipe of the system `scenes`: scenes of a grammar, and the system `captions` on them."""

    system: Literal["scenes"]
    segments: tuple[str, ...]
    """Which ids come first: image, special and text in some order."""
    layout: Orders
    model: TransformerConfig
    """Without `max_length`, which is that of the layout's longest sequence; `preset` names one of `PRESETS` to start
    from."""
    begin_with: Path | None = None
    """Bundle whose weights the training begins with, of the same layout, words and shape. None: random ones."""

    @model_validator(mode="after")
    def _in_range(self) -> "ScenesRecipe":
        BPEConfig(image_size=1, text_size=self.text_size, specials=self.layout.specials, order=self.segments)
        self.layout.make(codebook_size=1, text_vocab_size=1)
        return self


class PartiScenesRecipe(OfScenes):
    """A checked recipe of the system `scenes-parti`: scenes of a grammar, and the system `parti` on them."""

    system: Literal["scenes-parti"]
    max_text: int = 24
    """Pieces of a caption that are read at most."""
    model: PartiModel

    @model_validator(mode="after")
    def _in_range(self) -> "PartiScenesRecipe":
        UnigramConfig(text_size=self.text_size)
        self.model.config(text_size=1, max_text=self.max_text, codebook_size=1, grid=(1, 1))
        return self


class LabelledPicturesData(Section):
    """Pictures of classes: a folder with one folder for each, a parquet table with the columns image and label, or
    MNIST's four idx files."""

    train: Path | None = None
    held_out: Path | None = None
    """Pictures of the same classes to measure on. None: a share of the training ones; MNIST has its own."""
    held_out_share: float = Field(default=0.05, gt=0, lt=1)
    ten_crop: bool = False
    """Train on ten crops of each picture: corners and centre of the picture made a tenth larger, and these mirrored."""
    scale: int = 1
    """Drawn pictures are enlarged this many times."""


class LlamaGenModel(Section):
    """A transformer of LlamaGen's kind: 2-D rotary positions, RMSNorm, SwiGLU."""

    num_layers: int
    d_model: int
    num_heads: int
    d_ff: int
    dropout: float = 0.1

    @property
    def _positions(self) -> dict[str, Any]:
        return {"positions": "rotary_2d", "grid": (1, 1)}

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        TransformerConfig(
            num_layers=self.num_layers,
            d_model=self.d_model,
            num_heads=self.num_heads,
            d_ff=self.d_ff,
            max_length=1,
            dropout=self.dropout,
            **self._positions,
        )
        return self


class ClassModel(LlamaGenModel):
    """LlamaGen's, or a RAR."""

    family: Literal["llamagen", "rar"] = "llamagen"

    @property
    def _positions(self) -> dict[str, Any]:
        return super()._positions if self.family == "llamagen" else {}


class ClassesRecipe(Section):
    """A checked recipe of the system `classes`: pictures of classes, class-conditional image generation (c2i)."""

    system: Literal["classes"]
    description: str
    expects: str
    minutes: Minutes = {}
    data: LabelledPicturesData
    image_tokenizer: Path | None = None
    """Folder of a trained image tokenizer, or a bundle that has one."""
    model: ClassModel
    permuted: tuple[float, float] = (0.5, 0.75)
    """Of a RAR, in place of `train.permuted`: the published shares."""
    train: TrainConfig
    sample: Sampling = Sampling()
    """With which settings pictures are drawn beside the guidance scale, which is that which comes nearest to real
    pictures."""
    evaluate: ClassesReportConfig = ClassesReportConfig()
    about: dict[str, str] = {}
    """What the model card says of data and licence."""
    output: Path

    @model_validator(mode="after")
    def _in_range(self) -> "ClassesRecipe":
        _ = self.training
        return self

    @property
    def training(self) -> TrainConfig:
        """`train`, of a RAR with the shares of permuted pictures."""
        if self.model.family == "rar" and self.train.permuted is None:
            return replace(self.train, permuted=self.permuted)
        return self.train


class TextToImageStage(Section):
    """One training, on pictures of one size."""

    image_size: tuple[int, int] | None = None
    """Rows and columns of pixels; None: those of the image tokenizer."""
    data: Path | None = None
    """Pictures with captions to take in place of the recipe's, and `validation` likewise."""
    validation: Path | None = None
    train: TrainConfig


class TextToImageRecipe(Section):
    """A checked recipe of the system `text to image`: pictures of captions that a text encoder reads (t2i)."""

    system: Literal["text to image"]
    description: str
    expects: str
    minutes: Minutes = {}
    data: Path | None = None
    """Pictures with captions, as `open_pairs` finds them: parquet, webdataset shards, or a folder."""
    validation: Path | None = None
    """Others to measure on. None: some of `data` are held out."""
    held_out: float | int = 0.05
    """What is held out where there is no `validation`: a share, or a number."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do about a broken picture, or one without a caption."""
    scale: int = 1
    """Drawn pictures are enlarged this many times."""
    image_tokenizer: Path | None = None
    """Folder of a trained image tokenizer, or a bundle that has one. Of two stages, one that takes any size."""
    text_encoder: str | None = None
    """Folder of a T5 encoder, as transformers saves it, or the hub's owner/name."""
    num_features: int = Field(default=MAX_FEATURES, ge=2)
    """Tokens of a caption that are read at most."""
    clean_captions: bool = True
    """Give captions to the text encoder as LlamaGen does: in lower case, with plain quotes and dashes."""
    features: Path | None = None
    """Folder to keep features of captions in, which several runs may share. None: in the run's own."""
    model: LlamaGenModel
    stage1: TextToImageStage
    stage2: TextToImageStage | None = None
    """Goes on with the weights of the first, as a rule at larger pictures. None: there is but one."""
    watch: SampleTableConfig = SampleTableConfig()
    sample: Sampling = Sampling()
    evaluate: CaptionsReportConfig = CaptionsReportConfig()
    about: dict[str, str] = {}
    """What the model card says of data and licence."""
    output: Path

    @model_validator(mode="after")
    def _in_range(self) -> "TextToImageRecipe":
        if self.held_out <= 0:
            raise ValueError(f"held_out is {self.held_out}; it must be more than 0.")
        return self


AnyRecipe = (
    Recipe
    | LinesRecipe
    | TokenizerRecipe
    | UpsamplerRecipe
    | CaptionsRecipe
    | ScenesRecipe
    | PartiScenesRecipe
    | PartiRecipe
    | ClassesRecipe
    | TextToImageRecipe
)
System = (
    type[Recipe]
    | type[LinesRecipe]
    | type[TokenizerRecipe]
    | type[UpsamplerRecipe]
    | type[CaptionsRecipe]
    | type[ScenesRecipe]
    | type[PartiScenesRecipe]
    | type[PartiRecipe]
    | type[ClassesRecipe]
    | type[TextToImageRecipe]
)
SYSTEMS: dict[str, System] = {
    "digits": Recipe,
    "lines": LinesRecipe,
    "image tokenizer": TokenizerRecipe,
    "upsampler": UpsamplerRecipe,
    "captions": CaptionsRecipe,
    "scenes": ScenesRecipe,
    "scenes-parti": PartiScenesRecipe,
    "parti": PartiRecipe,
    "classes": ClassesRecipe,
    "text to image": TextToImageRecipe,
}
"""Kinds of recipes, by their entry `system`."""
