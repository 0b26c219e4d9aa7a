"""Whole bundles small enough to build in a test, of random weights: one of digits, one of free captions."""

from pathlib import Path

import torch

from smalti.bundle import Bundle
from smalti.data.digits import words
from smalti.image_files import PictureConfig
from smalti.image_tokenizers.quantizer import QuantizerConfig
from smalti.image_tokenizers.vqvae import VQVAE, VQVAEConfig
from smalti.models.config import TransformerConfig
from smalti.models.decoder_only import new_model
from smalti.sequences.layout import Layout
from smalti.sequences.vocabulary import Vocabulary
from smalti.tasks.images import Pipeline
from smalti.text_tokenizer import BPEConfig, TextTokenizer

CODEBOOK_SIZE = 37
ORDERS = {
    "text to image": "<bos> <end of image> text{6} <end of text> image{49}",
    "image to text": "<bos> <end of text> image{49} <end of image> text{6}",
}


def tiny_pipeline(seed: int = 0) -> Pipeline:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        text_tokenizer = TextTokenizer.from_words(words(), spellings={"eigth": "eight"})
        specials = ["<bos>", "<end of image>", "<end of text>"]
        vocabulary = Vocabulary({"special": specials, "image": CODEBOOK_SIZE, "text": text_tokenizer.vocab_size})
        layout = Layout.parse(vocabulary, ORDERS)
        transformer = TransformerConfig(num_layers=1, d_model=24, num_heads=3, d_ff=29, max_length=layout.max_length)
        model = new_model(layout, transformer)
        for parameter in model.parameters():  # far from even odds, so that what is likely shows
            torch.nn.init.normal_(parameter, std=0.3)
        quantizer = QuantizerConfig(codebook_size=CODEBOOK_SIZE, code_dim=5, update="gradient")
        image_tokenizer = VQVAE(
            VQVAEConfig(width=8, num_heads=2, encoder_blocks=1, decoder_blocks=1, quantizer=quantizer)
        )
        bundle = Bundle(
            model=model,
            layout=layout,
            image_tokenizer=image_tokenizer,
            text_tokenizer=text_tokenizer,
            pictures=PictureConfig(height=28, width=28, levels=4, scale=2),
            figures={"test nats per token": 3.25},
            name="tiny",
        )
        return Pipeline(bundle)


def save_tiny_bundle(directory: Path) -> Path:
    tiny_pipeline().save(directory)
    return directory


BPE_CAPTIONS = [
    "a purple dog on a red tree",
    "two cats on a tree",
    "a dog and two red cats",
    "ein Café auf der Straße",
] * 3
BPE_CONFIG = BPEConfig(image_size=CODEBOOK_SIZE, text_size=290)


def tiny_bpe_pipeline() -> Pipeline:
    """One order, caption before picture, captions of any length up to 11 tokens; a Llama."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layout = Layout.parse(
            BPE_CONFIG.vocabulary, {"text to image": "text{..11} <|startofimage|> image{49} <|endofimage|>"}
        )
        transformer = TransformerConfig(
            num_layers=1, d_model=24, num_heads=3, d_ff=29, max_length=layout.max_length, bias=False,
            norm="rms", feed_forward="swiglu", positions="rotary",
        )  # fmt: skip
        model = new_model(layout, transformer)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        quantizer = QuantizerConfig(codebook_size=CODEBOOK_SIZE, code_dim=5, update="gradient")
        config = VQVAEConfig(width=8, num_heads=2, encoder_blocks=1, decoder_blocks=1, quantizer=quantizer)
        bundle = Bundle(
            model=model,
            layout=layout,
            image_tokenizer=VQVAE(config),
            text_tokenizer=TextTokenizer.train(BPE_CAPTIONS, BPE_CONFIG)[0],
            pictures=PictureConfig(height=28, width=28, levels=4, scale=1),
            name="words",
        )
        return Pipeline(bundle)
