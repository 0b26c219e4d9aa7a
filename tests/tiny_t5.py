"""A T5 encoder of random weights with a tokenizer of a few words, and a model of captions that reads its features."""

from pathlib import Path

import pytest
import torch

from smalti.bundle import Bundle, Sampling, TextEncoderConfig
from smalti.engine.sampling import SampleConfig
from smalti.image_files import PictureConfig
from smalti.image_tokenizers.quantizer import QuantizerConfig
from smalti.image_tokenizers.vqgan import VQGAN, VQGANConfig
from smalti.models.config import LLAMAGEN, TransformerConfig
from smalti.models.decoder_only import new_model
from smalti.sequences.layout import Layout
from smalti.sequences.vocabulary import FEATURES, Vocabulary

WIDTH, CODES, PREFIX = 20, 13, 7
WORDS = ("a", "red", "blue", "green", "bar", "block", "across", "down", "fox", "snow", "in", "the", ",")


def save_t5(folder: Path, *, width: int = WIDTH, seed: int = 0) -> Path:
    """Saved by transformers itself. Captions end in </s>, as T5's do."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: i for i, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace()])
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = transformers.T5Config(
            vocab_size=len(vocabulary), d_model=width, d_kv=6, d_ff=24, num_layers=2, num_heads=3, dropout_rate=0.5
        )
        model = transformers.T5EncoderModel(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_vqgan(codes: int = CODES, size: int = 8) -> VQGAN:
    """One code for each 2 × 2 pixels, of random weights; it takes pictures of any size."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = VQGANConfig(
            quantizer=QuantizerConfig(codebook_size=codes, code_dim=3, update="gradient"),
            image_size=(size, size),
            channels=32,
            encoder_multipliers=(1, 1),
            decoder_multipliers=(1, 1),
            encoder_attention_levels=(),
            decoder_attention_levels=(),
            num_res_blocks=1,
            latent_channels=3,
        )
        return VQGAN(config).eval()


def tiny_bundle(text_encoder: TextEncoderConfig | None = None, *, zero_prefix_rotation: bool = False) -> Bundle:
    """Pictures of 4 × 4 codes behind up to 7 features."""
    layout = Layout.parse(Vocabulary({FEATURES: 0, "image": CODES}), {"caption to image": "features{7} image{16}"})
    sizes = dict(num_layers=2, d_model=24, num_heads=3, d_ff=32, max_length=layout.max_length)
    where = dict(grid=(4, 4), prefix_length=PREFIX, zero_prefix_rotation=zero_prefix_rotation)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = new_model(layout, TransformerConfig(**LLAMAGEN, **sizes, **where), feature_width=WIDTH)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    return Bundle(
        model=model,
        layout=layout,
        image_tokenizer=tiny_vqgan(),
        pictures=PictureConfig(height=8, width=8),
        text_encoder=text_encoder,
        sampling=Sampling(picture=SampleConfig(guidance_scale=7.5, top_k=1000)),
        name="tiny",
    )
