"""Import, verify and export foreign weights: what the commands of the same names do."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from torch import nn

from smalti.bundle import Bundle
from smalti.errors import InputError
from smalti.files import new_folder, refuse_existing
from smalti.image_tokenizers import load_image_tokenizer, save_image_tokenizer
from smalti.interop import (
    deepul,
    huggingface,
    ibq,
    llamagen_vq,
    maskgit_vq,
    open_magvit2,
    taming,
    titok,
    token_models,
    verifying,
    vit_vqgan,
)
from smalti.interop.keys import ImportReport, KeyLayout, config_beside, export_foreign, import_foreign, write_foreign
from smalti.interop.token_models import TOKEN_MODELS, Extras
from smalti.interop.verifying import ArrayError
from smalti.weight_files import read_config, read_weights

KINDS: Mapping[str, KeyLayout] = {
    "llamagen-vq": llamagen_vq.LAYOUT,
    "taming": taming.LAYOUT,
    "titok": titok.LAYOUT,
    "maskgit-vq": maskgit_vq.LAYOUT,
    "vit-vqgan": vit_vqgan.LAYOUT,
    "ibq": ibq.LAYOUT,
    "open-magvit2": open_magvit2.LAYOUT,
    "deepul": deepul.LAYOUT,
}


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What an import did. `errors` are those of the reference folder's arrays, where one was given."""

    report: ImportReport
    notes: tuple[str, ...]
    errors: tuple[ArrayError, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether every array of the reference folder came out within tolerance."""
        return all(error.holds for error in self.errors)


def import_weights(
    kind: str,
    file: Path,
    output_dir: Path,
    config: Path | None = None,
    verify_dir: Path | None = None,
    *,
    extras: Extras = Extras(),  # noqa: B008 (frozen)
    force: bool = False,
    allow_nonfinite: bool = False,
) -> Imported:
    """Writes the image tokenizer in a foreign weight file as a folder that `load_image_tokenizer` reads; of the kinds
    of TOKEN_MODELS and "hf-llama" a transformer, from a file or a folder, as a bundle.

    With `verify_dir` every output array of that reference folder is recomputed first, and nothing is written
    unless all of them hold. Raises InputError if a file cannot be read or does not fit, or holds values that are not
    finite, unless `allow_nonfinite`.
    """
    if kind in TOKEN_MODELS:
        return _import_token_model(
            kind, file, output_dir, config, verify_dir, extras, force=force, allow_nonfinite=allow_nonfinite
        )
    for name, value in vars(extras).items():
        if value is not None:
            raise InputError(f"--{name.replace('_', '-')} goes with {', '.join(TOKEN_MODELS)}, not with {kind}.")
    if kind == huggingface.KIND:
        return _import_llama(file, output_dir, config, verify_dir, force=force, allow_nonfinite=allow_nonfinite)
    layout = layout_of(kind)
    refuse_existing([output_dir], force=force)
    module, report, notes = _import(layout, file, config, verify_dir, allow_nonfinite)
    errors: list[ArrayError] = []
    if verify_dir is not None:
        errors, note = _verify_imported(layout, module, verify_dir)
        notes = (*notes, note)
    imported = Imported(report=report, notes=notes, errors=tuple(errors))
    if imported.holds:
        with new_folder(output_dir, force=force, holds=_has_weights, what="image tokenizer") as folder:
            save_image_tokenizer(module, folder)
    return imported


def verify(kind: str, directory: Path) -> list[ArrayError]:
    """The largest error of every output array of a reference folder, from the folder's own weights and config."""
    if kind == huggingface.KIND:
        return huggingface.verify_llama_folder(directory)
    if kind in TOKEN_MODELS:
        return token_models.verify_token_model(TOKEN_MODELS[kind], None, directory)[0]
    layout = layout_of(kind)
    return verifying.compare(layout, *verifying.read_reference(layout, directory))


def export_weights(kind: str, bundle_dir: Path, file: Path, *, force: bool = False) -> Path:
    """Writes an image tokenizer's weights, or of the kinds of TOKEN_MODELS a transformer's, in a foreign layout: as
    safetensors if `file` is called so and as the original saves them otherwise. The original's config comes beside it;
    its path is returned."""
    if kind in TOKEN_MODELS:
        return token_models.export_token_model(TOKEN_MODELS[kind], bundle_dir, file, force=force)
    layout = layout_of(kind)
    refuse_existing([file, config_beside(file)], force=force)
    inner = bundle_dir / "image_tokenizer"
    module = load_image_tokenizer(inner if inner.is_dir() else bundle_dir)
    if type(module) is not layout.build:
        raise InputError(f"{bundle_dir} holds a {type(module).__name__}, which the {kind} layout is not for.")
    state = export_foreign(layout, module)
    return write_foreign(file, state, layout.write_config(module), container=layout.container, force=force)


def layout_of(kind: str) -> KeyLayout:
    if kind not in KINDS:
        raise InputError(
            f"there is no kind {kind!r}; known are {', '.join((*KINDS, *TOKEN_MODELS, huggingface.KIND))}."
        )
    return KINDS[kind]


def error_table(errors: tuple[ArrayError, ...]) -> Table:
    """The largest error by array, for the terminal."""
    table = Table("array", "shape", "largest error", "allowed", "", box=None)
    for error in errors:
        unit = f"{error.largest_error:.2e}" if error.tolerance else f"{error.largest_error:g} unequal"
        allowed = f"{error.tolerance:.0e}" if error.tolerance else "0 unequal"
        shape = "×".join(map(str, error.shape)) or "scalar"
        table.add_row(error.name, shape, unit, allowed, "holds" if error.holds else "FAILS")
    return table


def _import(
    layout: KeyLayout, file: Path, config: Path | None, verify_dir: Path | None, allow_nonfinite: bool
) -> tuple[nn.Module, ImportReport, tuple[str, ...]]:
    """Sizes come from `config`; without one from the published models, or else from a config beside the file or in
    the reference folder."""
    weights = read_weights(file)
    if config is not None:
        return *import_foreign(
            layout, weights.tensors, read_config(config), allow_nonfinite=allow_nonfinite
        ), weights.notes
    nearby = [config_beside(file), *(f / "config.json" for f in (file.parent, verify_dir) if f)]
    found = next((path for path in nearby if path.is_file()), None)
    try:
        return *import_foreign(layout, weights.tensors, allow_nonfinite=allow_nonfinite), weights.notes
    except InputError:
        if found is None:
            raise
    notes = (*weights.notes, f"not a published size, so {found} was read")
    return *import_foreign(layout, weights.tensors, read_config(found), allow_nonfinite=allow_nonfinite), notes


def _import_llama(
    source: Path,
    output_dir: Path,
    config: Path | None,
    verify_dir: Path | None,
    *,
    force: bool,
    allow_nonfinite: bool,
) -> Imported:
    refuse_existing([output_dir], force=force)
    found = huggingface.read_llama(source, config, allow_nonfinite=allow_nonfinite)
    errors: list[ArrayError] = []
    notes = found.notes
    if verify_dir is not None:
        errors, note = huggingface.verify_llama(found, verify_dir)
        notes = (*notes, note)
    imported = Imported(report=found.report, notes=notes, errors=tuple(errors))
    if imported.holds:
        name = (source if source.is_dir() else source.parent).resolve().name
        made = Bundle(model=found.model, layout=found.layout, name=name, text_tokenizer=found.tokenizer)
        made.save(output_dir, force=force)
    return imported


def _import_token_model(
    kind: str,
    source: Path,
    output_dir: Path,
    config: Path | None,
    verify_dir: Path | None,
    extras: Extras,
    *,
    force: bool,
    allow_nonfinite: bool,
) -> Imported:
    refuse_existing([output_dir], force=force)
    found = token_models.import_token_model(TOKEN_MODELS[kind], source, config, extras, allow_nonfinite=allow_nonfinite)
    errors: list[ArrayError] = []
    notes = found.notes
    if verify_dir is not None:
        errors, note = token_models.verify_token_model(TOKEN_MODELS[kind], found.bundle, verify_dir)
        notes = (*notes, note)
    imported = Imported(report=found.report, notes=notes, errors=tuple(errors))
    if imported.holds:
        found.bundle.save(output_dir, force=force)
    return imported


def _verify_imported(layout: KeyLayout, module: nn.Module, directory: Path) -> tuple[list[ArrayError], str]:
    """Checks the imported weights themselves where the folder is of their sizes. A folder of another size (small
    reference models, for a large published file) certifies the same code with its own weights."""
    reference, arrays = verifying.read_reference(layout, directory)
    if reference.config == module.config:
        return verifying.compare(layout, module, arrays), f"the imported weights were run on {directory / 'io.npz'}"
    return (
        verifying.compare(layout, reference, arrays),
        f"{directory} is of other sizes than the imported file, so its own weights were run",
    )


def _has_weights(folder: Path) -> bool:
    return (folder / "model.safetensors").is_file()
