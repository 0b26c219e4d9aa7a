"""A whole bundle with an encoder-decoder, small enough to build in a test: random weights, captions of 9 pieces."""

import torch

from smalti.bundle import Bundle
from smalti.image_files import PictureConfig
from smalti.image_tokenizers.quantizer import QuantizerConfig
from smalti.image_tokenizers.vit_vqgan import ViTConfig, ViTVQGAN, ViTVQGANConfig
from smalti.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from smalti.tasks.images import Pipeline
from smalti.text_tokenizer import TextTokenizer, UnigramConfig

CAPTIONS = [f"a {colour} {shape}" for colour in ("red", "green", "blue") for shape in ("ball", "square")] * 2
TEXT_SIZE, MAX_TEXT, K, GRID = 380, 9, 19, (3, 5)
SHAPE = dict(encoder_layers=2, decoder_layers=3, d_model=24, num_heads=3, d_ff=29, dropout=0.0)


def config(**changes) -> EncoderDecoderConfig:
    sizes = dict(text_size=TEXT_SIZE, max_text=MAX_TEXT, codebook_size=K, grid=GRID)
    return EncoderDecoderConfig(**{**SHAPE, **sizes, **changes})


def model(seed: int = 0, **changes) -> EncoderDecoder:
    """Far from even odds, so that what is likely shows."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = EncoderDecoder(config(**changes)).eval()
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return made


def words() -> TextTokenizer:
    return TextTokenizer.train_unigram(CAPTIONS, UnigramConfig(text_size=TEXT_SIZE))[0]


def image_tokenizer() -> ViTVQGAN:
    quantizer = QuantizerConfig(codebook_size=K, code_dim=5, update="gradient")
    side = ViTConfig(width=8, num_layers=1, num_heads=2, head_dim=4, mlp_width=9)
    size = (8 * GRID[0], 8 * GRID[1])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ViTVQGAN(ViTVQGANConfig(image_size=size, patch_size=8, encoder=side, decoder=side, quantizer=quantizer))


def tiny(**changes) -> Pipeline:
    made = model(**changes)
    bundle = Bundle(
        model=made,
        layout=made.config.layout,
        image_tokenizer=image_tokenizer(),
        text_tokenizer=words(),
        pictures=PictureConfig(height=8 * GRID[0], width=8 * GRID[1]),
        name="tiny",
    )
    return Pipeline(bundle)
