"""Pairs that are tokens already: a table that `smalti tokenize` made, or a data set of the hub."""

from pathlib import Path
from typing import Any

from smalti.data.streams import TokenStream
from smalti.data.tokenize_pairs import require_tokenizers, tokenizer_metadata
from smalti.data.tokens import TokenTable, is_token_table
from smalti.errors import InputError
from smalti.text_tokenizer import TextTokenizer

HUB = "hub:"
"""What a data set's name on the hub, or the folder of a copy of it, begins with: hub:owner/name."""


def are_tokens(source: Path | str) -> bool:
    """Whether what lies there are tokens, and not pictures."""
    return str(source).startswith(HUB) or is_token_table(source)


def open_tokens(
    source: Path | str,
    split: str,
    image_tokenizer: Any,
    text_tokenizer: TextTokenizer,
    *,
    max_text_length: int,
    seed: int,
) -> TokenTable | TokenStream:
    """The pairs, in which every picture must be as many codes as the image tokenizer gives, and in its range.

    `split` and `seed` are for the hub's. Captions come as `text_tokens` where the writer says that this text tokenizer
    made them; else they are encoded from `text`, but only as a stream. Raises InputError naming both tokenizers if the
    tokens are of others; and naming file and row if one fails validation.
    """
    rows, columns = image_tokenizer.config.grid
    checks = {
        "image_length": rows * columns,
        "image_vocab_size": image_tokenizer.config.codebook_size,
        "text_vocab_size": text_tokenizer.vocab_size,
    }
    wanted = tokenizer_metadata(image_tokenizer, text_tokenizer)
    mend = "Tokenize the pictures again, or give the tokenizers it was made with."
    if not str(source).startswith(HUB):
        table = TokenTable.open(source, **checks)
        if "text_tokenizer_sha256" not in table.metadata:
            raise InputError(
                f"{source} does not say which text tokenizer made its text_tokens. Tokenize with --text-tokenizer; or "
                f"give a folder of the hub's schema as {HUB}FOLDER, of which the text itself is read."
            )
        require_tokenizers(_shared(table.metadata, wanted), wanted, source, mend)
        if table.max_text_length > max_text_length:
            raise InputError(
                f"{source} has captions of up to {table.max_text_length} tokens, the layout takes {max_text_length}. "
                f"Tokenize with --max-text-length {max_text_length}, or give the layout a longer span of text."
            )
        return table
    name = str(source).removeprefix(HUB)
    stream = TokenStream.open(
        name, split, seed=seed, text_tokenizer=text_tokenizer, max_text_length=max_text_length, **checks
    )
    of_pictures = tokenizer_metadata(image_tokenizer, None)
    if found := _shared(stream.metadata, of_pictures):
        require_tokenizers(found, of_pictures, source, mend)
    return stream


def _shared(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if name in wanted}
