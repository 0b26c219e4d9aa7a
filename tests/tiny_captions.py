"""A whole bundle of free captions, small enough to build in a test: random weights, captions of any length."""

import torch

from smalti.bundle import Bundle
from smalti.image_files import PictureConfig
from smalti.image_tokenizers.quantizer import QuantizerConfig
from smalti.image_tokenizers.vit_vqgan import ViTConfig, ViTVQGAN, ViTVQGANConfig
from smalti.models.config import TransformerConfig
from smalti.models.decoder_only import new_model
from smalti.sequences.layout import Layout
from smalti.tasks.images import Pipeline
from smalti.text_tokenizer import BPEConfig, TextTokenizer

SPECIALS = ("<|startoftext|>", "<|startofimage|>", "<|endofimage|>", "<|endoftext|>")
TEXT_FIRST = "<|startoftext|> (text{..40}) <|startofimage|> image{6} <|endofimage|>"
BOTH = {
    "text to image": TEXT_FIRST,
    "image to text": "<|startofimage|> (image{6}) <|endofimage|> text{..40} <|endoftext|>",
}
ONE = {"text to image": TEXT_FIRST}
FIGURES = ("cook", "pilot", "flag")
TONES = ("dark", "light")
H, W, K = 16, 24, 19


def tiny(orders) -> Pipeline:
    captions = [f"{figure}, {tone} skin tone" for figure in FIGURES for tone in TONES]
    config = BPEConfig(image_size=K, text_size=270, specials=SPECIALS)
    layout = Layout.parse(config.vocabulary, orders)
    shape = TransformerConfig(num_layers=1, d_model=16, num_heads=2, d_ff=20, max_length=layout.max_length)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        quantizer = QuantizerConfig(codebook_size=K, code_dim=5, update="gradient")
        side = ViTConfig(width=8, num_layers=1, num_heads=2, head_dim=4, mlp_width=9)
        image_tokenizer = ViTVQGAN(
            ViTVQGANConfig(image_size=(H, W), patch_size=8, encoder=side, decoder=side, quantizer=quantizer)
        )
        bundle = Bundle(
            model=new_model(layout, shape),
            layout=layout,
            image_tokenizer=image_tokenizer,
            text_tokenizer=TextTokenizer.train(captions, config)[0],
            pictures=PictureConfig(height=H, width=W),
            name="tiny",
        )
        return Pipeline(bundle)
