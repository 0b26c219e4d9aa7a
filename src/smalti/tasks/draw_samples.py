"""Thousands of pictures of classes or of a list of prompts, to be measured: as `.npz`, table, or a judge's own folder.

Picture i is drawn with the seed SEED + i, whatever the number of processes and whichever part it stands in: every
process works with one thread, so that sums are taken in one order, and the whole job takes one executor. The parts lie
beside the output (`.NAME.parts`), with a manifest that says what is being drawn; a job that was
killed keeps its whole parts, and goes on with any number of processes. At the end the parts are written as what was
asked for, one in memory at a time.

Letters: B pictures, H W rows and columns.
"""

import hashlib
import io
import json
import platform
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import UInt8
from PIL import Image

from smalti.arrays import read_npz
from smalti.bundle import Bundle, smalti_version
from smalti.data.parquet_files import parquet_writer
from smalti.data.parts import claim, do_parts, parts_folder, remove_leftovers
from smalti.data.prompt_lists import PromptList
from smalti.engine.generate import job_executor
from smalti.engine.sampling import SampleConfig
from smalti.errors import InputError
from smalti.files import lock_of, locked, made_again, new_file, new_folder, refuse_existing, write_json
from smalti.image_files import to_pictures
from smalti.progress import stage
from smalti.tasks.classes import ClassPipeline
from smalti.tasks.features import FeaturePipeline, captions_face
from smalti.tasks.images import Pipeline
from smalti.weights import file_sha256

MOST = 1_000_000
CARD_SUFFIX = ".card.json"
LAYOUTS = ("plain", "geneval", "geneval2", "dpg")
LABELS = ("balanced", "random")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """What is drawn of a bundle. Raises ValueError for what cannot be."""

    num: int
    """Pictures in all."""
    seed: int = 0
    """Picture i has the seed `seed` + i."""
    labels: str = "balanced"
    """How pictures are dealt out to classes: "balanced" takes them in turn, so that every part of the pictures has as
    many of each; "random" draws each one's class by the seed, as LlamaGen's script does."""
    per_prompt: int = 1
    """Pictures of a prompt, which stand together."""
    batch_size: int = 64
    pictures_per_part: int = 128
    """What is lost at most when a job is killed, for each process."""
    workers: int = 1
    """Processes, each of one thread; on a GPU, each with a copy of the model."""
    sampling: dict[str, Any] = field(default_factory=dict)
    """Fields of SampleConfig that differ from the bundle's own."""
    negative_prompt: str | None = None
    weights: str = "float32"
    dtype: str = "auto"
    text_encoder: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.num <= MOST:
            raise ValueError(f"num is {self.num:,}; expected 1 to {MOST:,} pictures.")
        if self.labels not in LABELS:
            raise ValueError(f"labels is {self.labels!r}; choose one of {', '.join(LABELS)}.")
        for name in ("per_prompt", "batch_size", "pictures_per_part", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if not 0 <= self.seed < 2**63 - MOST:
            raise ValueError(f"seed is {self.seed}; expected 0 to {2**63 - MOST - 1}.")


@dataclass(frozen=True)
class Subjects:
    """Of what pictures are drawn: classes by their labels, or prompts. One of the two is there."""

    labels: tuple[int, ...] = ()
    prompts: PromptList | None = None

    def of(self, numbers: range, config: SamplingConfig) -> list[Any]:
        """The label or the prompt of each of these pictures."""
        if self.prompts is not None:
            return [self.prompts.prompts[number // config.per_prompt] for number in numbers]
        if config.labels == "random":
            drawn = np.random.default_rng([config.seed, 1]).integers(0, len(self.labels), config.num)
            return [self.labels[place] for place in drawn[numbers.start : numbers.stop]]
        return [self.labels[number % len(self.labels)] for number in numbers]


@dataclass
class SamplesJob:
    """What a process needs to draw a part; it opens the bundle when it draws the first."""

    bundle: str
    folder: Path
    subjects: Subjects
    config: SamplingConfig
    executor: str
    face: "Face | None" = field(default=None, repr=False)

    @property
    def num_parts(self) -> int:
        return -(-self.config.num // self.config.pictures_per_part)

    def numbers(self, part: int) -> range:
        size = self.config.pictures_per_part
        return range(part * size, min((part + 1) * size, self.config.num))

    def file(self, part: int) -> Path:
        return self.folder / f"{part:08d}.npz"

    def do(self, part: int) -> None:
        """Draws the pictures of a part and writes them."""
        config, numbers = self.config, self.numbers(part)
        self.face = face = self.face or open_face(self.bundle, self.subjects, config)
        asked = self.subjects.of(numbers, config)
        more: dict[str, Any] = {} if isinstance(face, ClassPipeline) else {"negative_prompt": config.negative_prompt}
        codes = face.generate_codes(
            asked,
            seed=[config.seed + number for number in numbers],
            batch_size=config.batch_size,
            executor=self.executor,
            **more,
            **config.sampling,
        )
        # On a CPU each is decoded alone, so that no picture's last bit depends on those beside it.
        images = face.decode_images(codes, batch_size=1 if face.bundle.device.type == "cpu" else config.batch_size)
        pictures = np.stack([np.asarray(picture) for picture in to_pictures(images, face.pictures, 1)])
        with new_file(self.file(part), force=True) as temporary, temporary.open("wb") as file:
            np.savez(file, pictures=pictures)

    def pictures(self, part: int) -> UInt8[np.ndarray, "B H W 3"]:
        """Of a part that is drawn. Raises InputError if it is damaged."""
        with made_again(self.file(part)):
            return read_npz(self.file(part), "draw it again")["pictures"]


Face = ClassPipeline | Pipeline | FeaturePipeline


def open_face(bundle: str, subjects: Subjects, config: SamplingConfig) -> Face:
    """What draws the subjects. Raises InputError for a bundle that does not draw such."""
    loaded = Bundle.load(bundle, weights=config.weights, dtype=config.dtype)
    if subjects.prompts is None:
        return ClassPipeline(loaded)
    if loaded.classes is not None:
        raise InputError(f"{bundle} draws classes, not captions: give --classes instead of --prompts.")
    return captions_face(loaded, config.text_encoder)


def draw_samples(
    bundle: str,
    subjects: Subjects,
    output: Path,
    config: SamplingConfig,
    *,
    layout: str = "plain",
    command: str = "",
    force: bool = False,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Draws all pictures and writes them to `output`: `.npz` (`arr_0`, and `arr_1` for labels, as ADM's scripts have
    them), `.parquet`, or a folder in a `layout`; beside it how they were drawn, which is returned.

    Raises InputError before anything is drawn: if the output exists, unless `force`; if parts of another job lie there;
    for a prompt that the bundle cannot read; and for a layout that the prompts are not made for.
    """
    write = _writer(output, layout, subjects, config)
    card_file = output.with_name(output.name + CARD_SUFFIX)
    folder = parts_folder(output)
    if not force:
        remove_leftovers(output, card_file)
    refuse_existing([output, card_file], force=force)
    face = open_face(bundle, subjects, config)
    sampling = face.sample_config(face.sampling.picture, config.sampling)
    _check_prompts(face, subjects, sampling, config)
    manifest = _manifest(face, subjects, sampling, config)
    with locked(lock_of(folder), output):
        manifest |= {"executor": _executor(face, config)}
        manifest = claim(folder, manifest, partial(_require_same, output=output), lambda _: None, force=force)
        alone = config.workers == 1
        job = SamplesJob(bundle, folder, subjects, config, manifest["executor"], face if alone else None)
        missing = [part for part in range(job.num_parts) if not job.file(part).exists()]
        done = config.num - sum(len(job.numbers(part)) for part in missing)
        with stage("drawing", config.num, unit="picture", completed=done, show=show_progress) as progress:
            drawn = do_parts(job, missing, workers=0 if alone else config.workers, num_threads=1)
            for _, part in zip(drawn, missing, strict=True):
                progress.advance(len(job.numbers(part)))
        write(job, force)
        card = _card(face, manifest, config, layout, command, output)
        write_json(card_file, card, force=True)
        shutil.rmtree(folder)
    return card


# Manifest --------------------------------------------------------------------------------------------------------


def _executor(face: Face, config: SamplingConfig) -> str:
    return job_executor(face.model, face.layout, config.num, config.batch_size)


def _check_prompts(face: Face, subjects: Subjects, sampling: SampleConfig, config: SamplingConfig) -> None:
    """Raises InputError for the first prompt that the bundle cannot read, before hours of work."""
    if isinstance(face, Pipeline) and subjects.prompts is not None:
        for number, prompt in enumerate(subjects.prompts.prompts[: -(-config.num // config.per_prompt)]):
            try:
                face.text_tokenizer.encode(prompt)
            except InputError as error:
                raise InputError(f"{subjects.prompts.path}: prompt {number}: {error}") from error
    if isinstance(face, ClassPipeline):
        for label in subjects.labels[:1]:
            face.class_request(label, 0, sampling)  # which refuses guidance without a null condition


def _manifest(face: Face, subjects: Subjects, sampling: SampleConfig, config: SamplingConfig) -> dict[str, Any]:
    """What the pictures depend on."""
    classes, prompts = None, None
    if subjects.prompts is None:
        classes = list(subjects.labels)
    else:
        content = json.dumps(subjects.prompts.prompts, ensure_ascii=False)
        prompts = {"file": subjects.prompts.path.name, "num": len(subjects.prompts)}
        prompts |= {"sha256": hashlib.sha256(content.encode()).hexdigest()}
    content = {
        "num": config.num,
        "seed": config.seed,
        "classes": classes,
        "labels": config.labels if classes is not None else None,
        "prompts": prompts,
        "per_prompt": config.per_prompt if prompts is not None else None,
        "negative_prompt": config.negative_prompt,
        "sampling": asdict(sampling),
        "pictures_per_part": config.pictures_per_part,
        "bundle": face.name,
        "weights_sha256": face.weights_sha256,
        "weights": face.model.storage,
        "dtype": str(face.bundle.dtype).removeprefix("torch."),
        "device": face.bundle.device.type,
    }
    if isinstance(face, FeaturePipeline) and prompts is not None:
        content |= {"text_encoder_sha256": face.text_encoder.sha256}
    return json.loads(json.dumps(content))


def _require_same(found: dict[str, Any], manifest: dict[str, Any], output: Path) -> None:
    """Raises InputError unless parts were begun with the same settings; their executor is kept."""
    different = [name for name in manifest if name != "executor" and found.get(name) != manifest[name]]
    if different or not isinstance(found.get("executor"), str):
        raise InputError(
            f"the unfinished {output} was begun with other settings ({', '.join(different) or 'executor'} differ). "
            "Resume it with the same, or start anew with --force."
        )


def _card(
    face: Face, manifest: dict[str, Any], config: SamplingConfig, layout: str, command: str, output: Path
) -> dict[str, Any]:
    """What a protocol card takes over of how pictures were drawn."""
    return manifest | {
        "layout": layout if not output.suffix else output.suffix.removeprefix("."),
        "sha256": file_sha256(output) if output.is_file() else None,
        "size": [face.pictures.height, face.pictures.width],
        "threads": 1 if face.bundle.device.type == "cpu" else None,
        "command": command,
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {
            "smalti": smalti_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }


# Outputs ---------------------------------------------------------------------------------------------------------

Writer = Callable[[SamplesJob, bool], None]


def _writer(output: Path, layout: str, subjects: Subjects, config: SamplingConfig) -> Writer:
    """What writes the output. Raises InputError for a layout that cannot be."""
    if layout not in LAYOUTS:
        raise InputError(f"layout {layout!r} is unknown; choose one of {', '.join(LAYOUTS)}.")
    if output.suffix.lower() in (".npz", ".parquet"):
        if layout != "plain":
            raise InputError(f"{output}: the layout {layout} is a folder's; give the name of a folder.")
        is_npz = output.suffix.lower() == ".npz"
        return lambda job, force: (_write_npz if is_npz else _write_table)(job, output, force)
    if output.suffix:
        raise InputError(
            f"{output}: pictures are written as .npz or .parquet, or to a folder, whose name has no ending."
        )
    if layout != "plain":
        _check_layout(layout, subjects, config)
    into = {"plain": _plain, "geneval": _geneval, "geneval2": _geneval2, "dpg": _dpg}[layout]

    def write_folder(job: SamplesJob, force: bool) -> None:
        with new_folder(output, force=force, holds=_holds_samples, what="samples") as folder:
            into(job, folder)

    return write_folder


def _holds_samples(folder: Path) -> bool:
    return folder.with_name(folder.name + CARD_SUFFIX).is_file()


def _check_layout(layout: str, subjects: Subjects, config: SamplingConfig) -> None:
    prompts = subjects.prompts
    if prompts is None:
        raise InputError(f"the layout {layout} is one of prompts: give --prompts, or leave it out.")
    if config.num != len(prompts) * config.per_prompt:
        raise InputError(f"the layout {layout} takes all prompts: leave out -n.")
    if layout == "geneval" and not all("tag" in row and "prompt" in row for row in prompts.rows):
        raise InputError(
            f"{prompts.path}: GenEval's judge reads tag and prompt of each row: give its evaluation_metadata.jsonl."
        )
    if layout == "geneval2" and (config.per_prompt != 1 or len(set(prompts.prompts)) < len(prompts)):
        raise InputError(
            "GenEval 2's judge takes one picture of each prompt: leave out --per-prompt, and repeat no prompt."
        )
    if layout == "dpg" and (config.per_prompt not in (1, 4) or not prompts.path.is_dir()):
        raise InputError(
            "DPG-Bench's judge takes 1 or 4 pictures of each prompt in its folder of .txt files (--per-prompt)."
        )


def _each(job: SamplesJob) -> Iterator[tuple[int, Any, UInt8[np.ndarray, "H W 3"]]]:
    """Number, label or prompt, and picture, in order; one part in memory."""
    for part in range(job.num_parts):
        numbers = job.numbers(part)
        yield from zip(numbers, job.subjects.of(numbers, job.config), job.pictures(part), strict=True)


def _write_npz(job: SamplesJob, output: Path, force: bool) -> None:
    """As numpy.savez writes it, but from parts."""
    first = job.pictures(0)
    shape = (job.config.num, *first.shape[1:])
    with new_file(output, force=force) as temporary, zipfile.ZipFile(temporary, "w", allowZip64=True) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            header: Any = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for part in range(job.num_parts):
                file.write(job.pictures(part).tobytes())
        if job.subjects.prompts is None:
            with archive.open("arr_1.npy", "w") as file:
                labels = np.asarray(job.subjects.of(range(job.config.num), job.config), dtype=np.int64)
                np.lib.format.write_array(file, labels)


def _write_table(job: SamplesJob, output: Path, force: bool) -> None:
    """Columns image (PNG), label or caption, seed: as training and other readers take them."""
    of_classes = job.subjects.prompts is None
    name, kind = ("label", pa.int64()) if of_classes else ("caption", pa.string())
    schema = pa.schema([("image", pa.binary()), (name, kind), ("seed", pa.int64())])
    with new_file(output, force=force) as temporary, parquet_writer(temporary, schema) as writer:
        for part in range(job.num_parts):
            numbers = job.numbers(part)
            columns = {
                "image": [_png(picture) for picture in job.pictures(part)],
                name: job.subjects.of(numbers, job.config),
                "seed": [job.config.seed + number for number in numbers],
            }
            writer.write_batch(pa.RecordBatch.from_pydict(columns, schema))


def _png(picture: UInt8[np.ndarray, "H W 3"]) -> bytes:
    encoded = io.BytesIO()
    Image.fromarray(picture).save(encoded, format="PNG")
    return encoded.getvalue()


def _plain(job: SamplesJob, folder: Path) -> None:
    """`000000.png`, …, and `metadata.jsonl` with a line for each: its file, seed, label or prompt, and the prompt's
    row."""
    prompts = job.subjects.prompts
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as lines:
        for number, asked, picture in _each(job):
            name = f"{number:06d}.png"
            (folder / name).write_bytes(_png(picture))
            row: dict[str, Any] = {"file_name": name, "seed": job.config.seed + number}
            if prompts is None:
                row["label"] = asked
            else:
                row |= {"text": asked, "row": prompts.rows[number // job.config.per_prompt]}
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")


def _geneval(job: SamplesJob, folder: Path) -> None:
    """`00000/metadata.jsonl` with the prompt's row and `00000/samples/0000.png`, as djghosh13/geneval's
    evaluate_images.py reads them."""
    assert job.subjects.prompts is not None
    for number, _, picture in _each(job):
        place, i = divmod(number, job.config.per_prompt)
        inside = folder / f"{place:05d}" / "samples"
        if not i:
            inside.mkdir(parents=True)
            row = json.dumps(job.subjects.prompts.rows[place], ensure_ascii=False)
            (inside.parent / "metadata.jsonl").write_text(row + "\n", encoding="utf-8")
        (inside / f"{i:04d}.png").write_bytes(_png(picture))


def _geneval2(job: SamplesJob, folder: Path) -> None:
    """`images/00000.png` and `image_paths.json`, prompt to file, for `--image_filepath_data` of
    facebookresearch/GenEval2's evaluation.py, which is called in this folder."""
    (folder / "images").mkdir()
    paths: dict[str, str] = {}
    for number, prompt, picture in _each(job):
        paths[prompt] = f"images/{number:05d}.png"
        (folder / paths[prompt]).write_bytes(_png(picture))
    (folder / "image_paths.json").write_text(json.dumps(paths, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _dpg(job: SamplesJob, folder: Path) -> None:
    """`ITEM.png` for each prompt, the only files there: one picture, or four in two rows without a gap, which
    TencentQQGYLab/ELLA's compute_dpg_bench.py cuts apart by --resolution and --pic-num."""
    assert job.subjects.prompts is not None
    waiting: list[np.ndarray] = []
    for number, _, picture in _each(job):
        waiting.append(picture)
        if len(waiting) < job.config.per_prompt:
            continue
        whole = waiting[0] if len(waiting) == 1 else np.vstack([np.hstack(waiting[:2]), np.hstack(waiting[2:])])
        (folder / f"{job.subjects.prompts.names[number // job.config.per_prompt]}.png").write_bytes(_png(whole))
        waiting = []


def parse_classes(text: str, bundle: Any) -> tuple[int, ...]:
    """The labels of "all", or of numbers, ranges and names with commas between: "0,3,7-9,seven". Raises InputError for
    a class that there is not, or that is named twice."""
    if text.strip() == "all":
        return tuple(range(bundle.num))
    found: list[int] = []
    for word in (word.strip() for word in text.split(",") if word.strip()):
        first, dash, last = word.partition("-")
        if dash and first.isdecimal() and last.isdecimal():
            found += range(bundle.find(first), bundle.find(last) + 1)
        else:
            found.append(bundle.find(word))
    return _once(found, text)


def _once(found: Sequence[int], text: str) -> tuple[int, ...]:
    if not found:
        raise InputError(f"--classes is {text!r}; give all, or numbers, ranges and names with commas between.")
    twice = [label for label in found if found.count(label) > 1]
    if twice:
        raise InputError(f"--classes names class {twice[0]} twice.")
    return tuple(found)
