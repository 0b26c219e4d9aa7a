"""Bundles of a model alone: weights and layout, perhaps a text tokenizer, no pictures.

What a language model from elsewhere becomes when it is imported. `load_token_model` reads the model out of every kind
of bundle, since all of them keep it in the same way.
"""

import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from smalti import bundle
from smalti.models.decoder_only import DecoderOnly, DecoderOnlyConfig
from smalti.sequences.layout import Layout
from smalti.sequences.vocabulary import Vocabulary

KIND = "tokens"
"""What the `config.json` of such a bundle has under "kind"."""
ORDER = "text"


class TokenModel(NamedTuple):
    """A model in evaluation mode with the layout of its sequences."""

    model: DecoderOnly
    layout: Layout
    name: str
    text_tokenizer: Path | None
    """The bundle's `text_tokenizer.json`, if it has one."""


def one_segment_layout(vocab_size: int, length: int) -> Layout:
    """`text{length}`: every id may stand at every place."""
    return Layout.parse(Vocabulary({"text": vocab_size}), {ORDER: f"text{{{length}}}"})


def save_token_model(
    model: DecoderOnly,
    layout: Layout,
    directory: Path | str,
    *,
    name: str,
    text_tokenizer: Path | None = None,
    figures: Mapping[str, Any] = {},
    force: bool = False,
) -> None:
    """Writes the bundle as a folder; `text_tokenizer` is a file of the `tokenizers` library to put into it.

    Raises InputError if the folder exists and is not empty, unless `force`; then it must be a bundle.
    """

    def write_files(folder: Path) -> dict[str, Any]:
        bundle.save_weights(model.state_dict(), folder / bundle.WEIGHTS)
        if text_tokenizer is not None:
            shutil.copyfile(text_tokenizer, folder / bundle.TEXT_TOKENIZER)
        orders = "\n".join(f"    {order}" for order in layout.orders.values())
        card = CARD.format(name=name, num_parameters=f"{model.num_parameters:,}", orders=orders)
        (folder / bundle.CARD).write_text(card, encoding="utf-8")
        return {
            "kind": KIND,
            "name": name,
            "smalti_version": version("smalti"),
            "layout": layout.to_dict(),
            "model": model.config.to_dict(),
            "figures": dict(figures),
        }

    bundle.write_bundle(directory, write_files, force=force)


def load_token_model(name: str | Path) -> TokenModel:
    """Model and layout of a bundle of any kind, by folder, shipped name, or a hub's `owner/name`.

    Raises InputError if there is none, or a file of it is missing or damaged.
    """
    directory = bundle.find_bundle(name)
    config = bundle.read_config(directory)
    path = directory / bundle.CONFIG
    with bundle.described_by(path):
        shape = DecoderOnlyConfig.from_dict(config["model"], f"{path}: model")
        model = bundle.load_module(lambda: DecoderOnly(shape), directory / bundle.WEIGHTS)
        layout = Layout.from_dict(config["layout"])
        model.check_layout(layout)
    text_tokenizer = directory / bundle.TEXT_TOKENIZER
    return TokenModel(
        model.eval(), layout, str(config.get("name", name)), text_tokenizer if text_tokenizer.is_file() else None
    )


CARD = """---
library_name: smalti
tags: [autoregressive, discrete-tokens]
---
# {name}

A decoder-only transformer of {num_parameters} parameters, without an image tokenizer. Its sequences:

{orders}

`smalti export hf THIS_FOLDER DIRECTORY` writes it as a Llama that `transformers` and LLM servers load.
"""
