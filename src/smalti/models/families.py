"""The models there are, by the name that bundles and checkpoints know them by."""

from pathlib import Path
from typing import Any

from smalti.errors import InputError, shortened
from smalti.models.decoder_only import DecoderOnly, DecoderOnlyConfig
from smalti.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from smalti.models.janus import Janus, JanusConfig
from smalti.models.rar import RAR, RARConfig

AnyModel = DecoderOnly | RAR | Janus | EncoderDecoder
AnyModelConfig = DecoderOnlyConfig | RARConfig | JanusConfig | EncoderDecoderConfig

FAMILIES: dict[str, tuple[type[AnyModelConfig], type[AnyModel]]] = {
    "decoder_only": (DecoderOnlyConfig, DecoderOnly),
    "rar": (RARConfig, RAR),
    "janus": (JanusConfig, Janus),
    "encoder_decoder": (EncoderDecoderConfig, EncoderDecoder),
}
"""The config and the module of each family."""


def describe_model(model: AnyModel) -> dict[str, Any]:
    """Family and config, ready for JSON."""
    family = next(name for name, (_, module) in FAMILIES.items() if type(model) is module)
    return {"family": family, "config": model.config.to_dict()}


def read_model_config(content: Any, path: Path) -> AnyModelConfig:
    """The config that `describe_model` gave. Raises InputError naming `path` and what is not as it must be."""
    family = content.get("family") if isinstance(content, dict) else content
    if not isinstance(family, str) or family not in FAMILIES:
        raise InputError(
            f"{path}: model: unknown family {shortened(repr(family))}; known are {', '.join(map(repr, FAMILIES))}."
        )
    return FAMILIES[family][0].from_dict(content["config"], f"{path}: model")


def build_model(config: AnyModelConfig) -> AnyModel:
    """A fresh model of a config."""
    if isinstance(config, RARConfig):
        return RAR(config)
    if isinstance(config, EncoderDecoderConfig):
        return EncoderDecoder(config)
    return Janus(config) if isinstance(config, JanusConfig) else DecoderOnly(config)
