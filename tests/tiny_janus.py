"""A Janus of `transformers` with random weights, small enough to draw with in a moment, in both key layouts."""

import json
import re
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

BEGIN, PAD, START = "<｜begin▁of▁sentence｜>", "<｜▁pad▁｜>", "<begin_of_image>"
MARKERS = (
    BEGIN,
    "<｜end▁of▁sentence｜>",
    "<image_placeholder>",
    PAD,
    START,
    "<end_of_image>",
    "<|User|>",
    "<|Assistant|>",
)
TEXT_SIZE = 271
"""Of the language model: more than the tokenizer's, as the published one's."""
CODES, CODE_DIM, SIDE, LENGTH = 37, 3, 3, 9
PROMPTS = ("a red tile", "  two tiles, one of them blue\n")
SHAPES = {
    "plain": {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 44},
    "grouped": {
        "hidden_size": 24,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "num_hidden_layers": 3,
        "intermediate_size": 36,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
    "deep": {"hidden_size": 20, "num_attention_heads": 1, "num_hidden_layers": 1, "intermediate_size": 28},
}
ALIGNER_DEPTHS = {"plain": 2, "grouped": 2, "deep": 3}


@cache
def tokenizer() -> Tokenizer:
    """Bytes, and markers behind them, as the published one has them in small."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    found = Tokenizer(models.BPE({piece: i for i, piece in enumerate(alphabet)}, []))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    found.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in MARKERS])
    return found


def prompt_ids(prompt: str) -> list[int]:
    """As the script of the original makes them, `generation_inference.py`."""
    words = tokenizer()
    text = f"<|User|>: {prompt.strip()}\n\n<|Assistant|>:{START}"
    return [words.token_to_id(BEGIN), *words.encode(text, add_special_tokens=False).ids]


def null_ids(ids: list[int]) -> list[int]:
    return [ids[0], *[tokenizer().token_to_id(PAD)] * (len(ids) - 2), ids[-1]]


def transformers_config(shape: str = "plain") -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import JanusConfig, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig

        D = SHAPES[shape]["hidden_size"]
        looking = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": D}
        drawing = {"base_channels": 32, "channel_multiplier": [1, 2], "num_res_blocks": 1, "latent_channels": 5}
        codes = {"num_embeddings": CODES, "embed_dim": CODE_DIM, "projection_dim": D, "image_token_embed_dim": D}
        depth = ALIGNER_DEPTHS[shape]
        return JanusConfig(
            text_config=LlamaConfig(vocab_size=TEXT_SIZE, max_position_embeddings=97, **SHAPES[shape]),
            vision_config=JanusVisionConfig(
                image_size=2 * SIDE, patch_size=2, num_image_tokens=LENGTH, depth=2, **looking
            ),
            vq_config=JanusVQVAEConfig(num_hidden_layers=depth, **drawing, **codes),
            tie_word_embeddings=False,
        )


@cache
def transformers_model(shape: str = "plain") -> Any:
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        from transformers import JanusForConditionalGeneration

        torch.manual_seed(0)
        model = JanusForConditionalGeneration(transformers_config(shape)).eval()
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    return model


RENAMES = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.generation_embeddings\.", "gen_embed."),
    (r"^model\.generation_aligner\.fc1\.", "gen_aligner.layers.0."),
    (r"^model\.generation_aligner\.hidden_layers\.0\.", "gen_aligner.layers.2."),
    (r"^model\.generation_aligner\.hidden_layers\.1\.", "gen_aligner.layers.4."),
    (r"^model\.generation_head\.proj_out\.", "gen_head.output_mlp_projector."),
    (r"^model\.generation_head\.", "gen_head."),
    (r"^model\.vision_model\.", "vision_model.vision_tower."),
    (r"^model\.aligner\.fc1\.", "aligner.layers.0."),
    (r"^model\.aligner\.hidden_layers\.0\.", "aligner.layers.2."),
    (r"^model\.vqmodel\.(en|de)coder\.(?:down|up)\.(\d+)\.block\.", r"gen_vision_model.\1coder.conv_blocks.\2.res."),
    (r"^model\.vqmodel\.(en|de)coder\.(?:down|up)\.", r"gen_vision_model.\1coder.conv_blocks."),
    (r"^model\.vqmodel\.(en|de)coder\.mid\.block_1\.", r"gen_vision_model.\1coder.mid.0."),
    (r"^model\.vqmodel\.(en|de)coder\.mid\.attn_1\.", r"gen_vision_model.\1coder.mid.1."),
    (r"^model\.vqmodel\.(en|de)coder\.mid\.block_2\.", r"gen_vision_model.\1coder.mid.2."),
    (r"^model\.vqmodel\.", "gen_vision_model."),
)
"""The published conversion of one layout into the other, backwards."""


def original_state(model: Any) -> dict[str, Tensor]:
    """The weights under the keys of deepseek-ai/Janus."""
    state = {"gen_vision_model.quantize.codebook_used": torch.zeros(11)}
    for key, tensor in model.state_dict().items():
        for pattern, replacement in RENAMES:
            if re.search(pattern, key):
                state[re.sub(pattern, replacement, key)] = tensor.clone()
                break
        else:
            raise AssertionError(key)
    return state


def original_config(shape: str = "plain") -> dict[str, Any]:
    """As deepseek-ai/Janus writes it, with the sizes of an image tokenizer that is no VQ-16 beside."""
    sizes = dict(SHAPES[shape])
    D = sizes["hidden_size"]
    rope = sizes.pop("rope_parameters", None)
    sizes |= {"rope_theta": rope["rope_theta"]} if rope else {}
    text = {"model_type": "llama", "vocab_size": TEXT_SIZE, "max_position_embeddings": 97, "torch_dtype": "bfloat16"}
    aligner = {"depth": ALIGNER_DEPTHS[shape], "input_dim": CODE_DIM, "n_embed": D, "projector_type": "mlp_gelu"}
    head = {"image_token_embed": D, "image_token_size": CODES, "n_embed": D}
    args = {"codebook_size": CODES, "codebook_embed_dim": CODE_DIM, "z_channels": 5}
    args |= {"encoder_ch_mult": [1, 2], "decoder_ch_mult": [1, 2]}
    return {
        "architectures": ["MultiModalityCausalLM"],
        "model_type": "multi_modality",
        "language_config": text | sizes,
        "gen_vision_config": {
            "cls": "VQ-16",
            "params": {"image_token_size": CODES, "n_embed": CODE_DIM},
            "ModelArgs": args,
            "Encoder_Decoder": {"ch": 32, "num_res_blocks": 1},
        },
        "gen_aligner_config": {"cls": "MlpProjector", "params": aligner},
        "gen_head_config": {"cls": "vision_head", "params": head},
        "vision_config": {"cls": "CLIPVisionTower", "params": {"image_size": 2 * SIDE}},
        "torch_dtype": "bfloat16",
    }


def save_checkpoint(folder: Path, layout: str = "original", shape: str = "plain") -> Path:
    """A folder as it is published: weights, config, tokenizer."""
    folder.mkdir(parents=True)
    model = transformers_model(shape)
    if layout == "transformers":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save_pretrained(folder)
    else:
        save_file(original_state(model), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(original_config(shape)))
    tokenizer().save(str(folder / "tokenizer.json"))
    return folder
