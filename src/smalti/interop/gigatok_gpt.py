"""GigaTok's transformers from class labels (SilentView/GigaTok, autoregressive/models/gpt_1d.py).

They are LlamaGen's, with its keys, but for the positions: a picture's codes stand in no grid, so that each position of
the sequence, the label's too, has a learned vector. Their number says how many codes a picture has.
"""

from collections.abc import Mapping, MutableMapping

from torch import Tensor

from smalti.errors import InputError
from smalti.interop import llamagen_gpt
from smalti.interop.fields import HEADER, Fields, check_header, sizes_go_together
from smalti.interop.fused import Piece, PieceMap, build_of, read_fused
from smalti.interop.keys import ImportReport
from smalti.models.config import TransformerConfig
from smalti.models.decoder_only import DecoderOnly, DecoderOnlyConfig
from smalti.sequences.layout import Layout
from smalti.sequences.vocabulary import Vocabulary

CLASS_NAME = "autoregressive.models.gpt_1d.Transformer"
POSITIONS = "positional_embedding"
UNREAD = (*llamagen_gpt.UNREAD, "use_flash_attn", "no_adaLN_before", "caption_dim")
SWITCHES = ("rope", "use_qk_norm", "use_adaLN", "use_simple_adaLN")
"""They make another network; none of the commands that go with the published weights has one on."""
SWITCHED_KEYS = {
    ".attention.q_norm.": "--qk-norm",
    ".attention.k_norm.": "--qk-norm",
    ".adaLN_modulation.": "--adaLN",
    ".ada_gss": "--simple-adaLN",
}


def read_config(config: dict) -> tuple[DecoderOnlyConfig, Layout]:
    """Ours from the fields of the original's `ModelArgs`, alone or in a section of that name."""
    check_header(config, CLASS_NAME, None)
    fields = Fields(config, "config")
    args = fields.section("ModelArgs") if "ModelArgs" in config else fields
    for switch in SWITCHES:
        args.expect(switch, False)
    args.expect("model_type", "c2i")
    args.expect("cls_token_num", 1)
    num_codes, codes = args.take("block_size", int), args.take("vocab_size", int)
    with sizes_go_together():
        sizes = llamagen_gpt.read_sizes(args)
        transformer = TransformerConfig(max_length=1 + num_codes, positions="learned", **sizes)
        num_labels = args.take("num_classes", int, 1000) + (args.take("class_dropout_prob", float, 0.1) > 0)
        args.finish(*UNREAD, *HEADER)
        vocabulary = Vocabulary({"image": codes, "label": num_labels})
        ours = DecoderOnlyConfig(vocab_size=vocabulary.size, transformer=transformer, head_ranges=((0, codes),))
        return ours, Layout.parse(vocabulary, {"label to image": f"label{{1}} image{{{num_codes}}}"})


def infer_config(state: Mapping[str, Tensor]) -> tuple[dict, str]:
    """GigaTok's config of a state dict of one of LlamaGen's published sizes, and the name of that size. Raises
    InputError if the shapes are of none of them."""
    sizes, name = llamagen_gpt.infer_sizes(state, "GigaTok")
    positions, labels = state.get(POSITIONS), state.get("cls_embedding.embedding_table.weight")
    if positions is None or labels is None or (positions.ndim, labels.ndim) != (2, 2):
        raise InputError(
            f"this is no transformer of GigaTok: expected {POSITIONS} with a row for the label and one for each code, "
            "and cls_embedding.embedding_table.weight. One without such positions may be LlamaGen's (import it as "
            "llamagen), or trained with --rope, which is not read."
        )
    return {**sizes, "block_size": positions.shape[0] - 1, "num_classes": labels.shape[0] - 1}, name


def write_config(config: DecoderOnlyConfig, layout: Layout, num_classes: int) -> dict:
    """GigaTok's fields of a model that it can express. Raises InputError for another, saying why."""
    ours, labels = config.transformer, layout.vocabulary["label"].size
    args = {
        **llamagen_gpt.write_sizes(ours),
        "rope": False,
        "num_classes": num_classes,
        "class_dropout_prob": 0.1 if labels > num_classes else 0.0,
        "vocab_size": layout.vocabulary["image"].size,
        "block_size": ours.max_length - 1,
    }
    written = {"class": CLASS_NAME, "ModelArgs": args}
    llamagen_gpt.require_same("GigaTok", written, read_config, config, layout)
    return written


def piece_map(config: DecoderOnlyConfig) -> PieceMap:
    """The original's key, or keys, of every tensor of ours."""
    positions = Piece(POSITIONS, (config.transformer.max_length, config.transformer.d_model))
    return {**llamagen_gpt.piece_map(config), "transformer.positions.weight": (positions,)}


def read_gigatok(
    state: MutableMapping[str, Tensor], config: dict, *, allow_nonfinite: bool = False
) -> tuple[DecoderOnly, Layout, ImportReport]:
    """The model of a GigaTok state dict, in evaluation mode, and its layout; its weights may share the memory of
    `state`, which is emptied. Raises InputError if a tensor is missing, has another shape or is left over, and for a
    config that says what is not known here, or for a network with one of `SWITCHES` on."""
    for part, option in SWITCHED_KEYS.items():
        if key := next((key for key in state if part in key), None):
            raise InputError(f"{key} is there: this GigaTok was trained with {option}, which is not read.")
    ours, layout = read_config(config)
    model = build_of(lambda: DecoderOnly(ours), state)
    report = read_fused(
        model,
        state,
        piece_map(ours),
        droppable={".k_cache": "a cache", ".v_cache": "a cache"},
        sizes="from the config",
        allow_nonfinite=allow_nonfinite,
    )
    return model, layout, report
