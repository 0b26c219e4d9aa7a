"""The keys of VQGAN checkpoints: LlamaGen, transformers, taming-transformers, MaskGIT-VQGAN and Open-MAGVIT2 name the
same layers differently.

Each function gives the foreign key of a key of ours; `num_levels` counts the decoder's levels.
"""

import re

_OUTER = {
    "to_code.": "quant_conv.",
    "from_code.": "post_quant_conv.",
    "quantizer.codebook": "quantize.embedding.weight",
}


def llamagen_key(name: str) -> str:
    """`decoder.conv_blocks.0` is the lowest resolution, as with us."""
    name = _common(name)
    name = re.sub(r"\blevels\.(\d+)\.blocks\.", r"conv_blocks.\1.res.", name)
    name = re.sub(r"\blevels\.(\d+)\.", r"conv_blocks.\1.", name)
    name = re.sub(r"^(encoder.*)\.resample\.", r"\1.downsample.", name)
    return re.sub(r"^(decoder.*)\.resample\.", r"\1.upsample.", name)


def transformers_key(name: str) -> str:
    """As the Janus of `transformers` has LlamaGen's: the levels in LlamaGen's order, the rest named as in taming."""
    name = re.sub(r"\bconv_blocks\.(\d+)\.res\.", r"conv_blocks.\1.block.", _middle(llamagen_key(name)))
    name = name.replace("encoder.conv_blocks.", "encoder.down.")
    return name.replace("decoder.conv_blocks.", "decoder.up.")


def taming_key(name: str, num_levels: int) -> str:
    """`decoder.up.0` is the highest resolution, the reverse of ours."""
    name = _down_and_up(_common(name), num_levels)
    name = _middle(name)
    name = re.sub(r"^(encoder.*)\.resample\.", r"\1.downsample.", name)
    return re.sub(r"^(decoder.*)\.resample\.", r"\1.upsample.", name)


def maskgit_key(name: str, num_levels: int) -> str:
    """As in taming, but the middle is a plain list and the convolution after an upsampling has its own name."""
    return _down_and_up(_common(name), num_levels).replace(".resample.conv.", ".upsample_conv.")


def open_magvit2_key(name: str, num_levels: int) -> str:
    """As in taming, but for the middle, the resampling, and the norms that stand in a list of their own."""
    name = _down_and_up(_common(name), num_levels).replace(".mid.", ".mid_block.")
    name = name.replace(".resample.conv.", ".upsample.conv1.").replace(".resample.", ".downsample.")
    name = re.sub(r"^decoder\.norms\.(\d+)\.", lambda m: f"decoder.adaptive.{num_levels - 1 - int(m[1])}.", name)
    return re.sub(r"^(decoder\.adaptive\.\d+)\.scale\.", r"\1.gamma.", name).replace(".shift.", ".beta.")


def _middle(name: str) -> str:
    for ours, theirs in (("mid.0.", "mid.block_1."), ("mid.1.", "mid.attn_1."), ("mid.2.", "mid.block_2.")):
        name = name.replace(ours, theirs)
    return name


def _common(name: str) -> str:
    for ours, theirs in _OUTER.items():
        if name.startswith(ours):
            return name.replace(ours, theirs, 1)
    name = name.replace(".shortcut.", ".nin_shortcut.").replace(".attentions.", ".attn.")
    return re.sub(r"\.out\.", ".proj_out.", name)


def _down_and_up(name: str, num_levels: int) -> str:
    name = re.sub(r"\bblocks\.(\d+)\.", r"block.\1.", name)
    name = re.sub(r"^encoder\.levels\.", "encoder.down.", name)
    return re.sub(r"^decoder\.levels\.(\d+)\.", lambda m: f"decoder.up.{num_levels - 1 - int(m[1])}.", name)
