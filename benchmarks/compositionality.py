"""Where a bundle of scenes binds words to pictures: attention by word, what contradicted words cost and where, and
pictures after one word's keys and values were swapped.

    python benchmarks/compositionality.py BUNDLE -o out/compositionality.json

Writes a JSON file and prints the same as Markdown tables. Rates carry Wilson's intervals of 95 %.
"""

import argparse
import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from smalti.data.scene_reading import read_picture
from smalti.data.scene_tables import scene_row
from smalti.data.scenes import (
    BACKGROUNDS,
    COLOURS,
    INVERSE,
    SHAPES,
    SIZES,
    TEXTURES,
    Group,
    Scene,
    render,
    unseen_kinds,
)
from smalti.errors import InputError
from smalti.evaluate.prompts import Share, to_pixels
from smalti.inspect.words import Swap, attention_to_text, difference, picture_nats, swapped_codes
from smalti.models.encoder_decoder import EncoderDecoder
from smalti.tasks.images import Pipeline

SWAPS = {
    "keys and values of the word": Swap(),
    "keys of the word": Swap(values=False),
    "values of the word": Swap(keys=False),
    "keys and values of the word and the next": Swap(following=1),
    "keys and values of all behind the word": Swap(word=False, following=None),
    "keys and values of the word and all behind it": Swap(following=None),
}
AROUND = {
    "keys and values of all but the word": Swap(word=False, preceding=None, following=None),
    "keys and values of all": Swap(preceding=None, following=None),
}
"""Of a text encoder, whose words before the swapped one have read it too."""
CHOICES = {"colour": list(COLOURS), "shape": list(SHAPES), "size": list(SIZES), "background": list(BACKGROUNDS),
           "texture": list(TEXTURES)}  # fmt: skip


AT_ONCE = 20
Pair = TypeVar("Pair")


def caption(content: dict[str, str]) -> str:
    return "a {size} {colour} {shape} on a {texture} {background} background".format(**content)


def singles(num: int, seed: int):
    """Scenes of one thing that training could show, each with its words."""
    index = 0
    while num:
        scene = scene_row("validation", index, seed).scene
        index += 1
        if scene.claim.kind == "single":
            [thing] = scene.content.things
            words = {"size": thing.size, "colour": thing.colour, "shape": thing.shape}
            yield scene, words | {"texture": scene.content.texture, "background": scene.content.background}
            num -= 1


def seen(scene: Scene, words: dict[str, str]) -> bool:
    [group] = scene.claim.groups
    group = group._replace(shape=words["shape"], colour=words["colour"], size=words["size"])
    return not unseen_kinds(scene.claim._replace(groups=(group,), background=words["background"]))


def other_words(scene: Scene, words: dict[str, str], what: str, stream: random.Random) -> dict[str, str] | None:
    """The words with another one of a kind, such that training could show them; None if there is none."""
    changed = [words | {what: choice} for choice in CHOICES[what] if choice != words[what]]
    fitting = [other for other in changed if seen(scene, other)]
    return stream.choice(fitting) if fitting else None


def swaps_of(pipe: Pipeline) -> dict[str, Swap]:
    return SWAPS | AROUND if isinstance(pipe.model, EncoderDecoder) else SWAPS


def together(pairs: Iterable[Pair], length: Callable[[Pair], int]) -> Iterator[list[Pair]]:
    """Pairs whose captions have as many text ids, AT_ONCE at most."""
    by_length = defaultdict(list)
    for pair in pairs:
        by_length[length(pair)].append(pair)
    for alike in by_length.values():
        yield from (alike[start : start + AT_ONCE] for start in range(0, len(alike), AT_ONCE))


def swapped(pipe: Pipeline, num: int, what: str) -> dict[str, Any]:
    """Of pictures drawn after each swap: how many show the other word, how many still their own."""
    stream, pairs = random.Random(f"swap {what}"), []
    for scene, words in singles(num, 1):
        other = other_words(scene, words, what, stream)
        if other is None:
            continue
        try:
            difference(pipe, caption(words), caption(other))
        except InputError:  # words of several pieces
            continue
        pairs.append((words, other))
    counts, total, swaps = defaultdict(lambda: np.zeros(3, int)), len(pairs), swaps_of(pipe)
    for chosen in together(pairs, lambda pair: len(pipe.text_tokenizer.encode(caption(pair[0])))):
        both = ([caption(pair[i]) for pair in chosen] for i in (0, 1))
        codes = swapped_codes(pipe, *both, list(swaps.values()))
        pictures = to_pixels(pipe.decode_images(codes.flatten(0, 1)))
        names = ("its own caption", "the other caption", *swaps)
        for index, picture in enumerate(pictures):
            (words, other), name = chosen[index // len(names)], names[index % len(names)]
            content = read_picture(picture)
            shown = {"background": content.background, "texture": content.texture}
            if len(content.things) == 1:
                [thing] = content.things
                shown |= {"colour": thing.colour or "", "shape": thing.shape or "", "size": thing.size or ""}
            rest = all(shown.get(kind) == words[kind] for kind in words if kind != what)
            counts[name] += [shown.get(what) == other[what], shown.get(what) == words[what], rest]
    return {
        name: {key: str(Share(int(value), total)) for key, value in zip(("other", "own", "rest"), row, strict=True)}
        for name, row in counts.items()
    }


class Two(NamedTuple):
    """Two things of different shapes and colours, and how they are spoken of."""

    scene: Scene
    first: Group
    second: Group
    between: str
    """A relation, or "and"."""

    def caption(self, first: str, second: str) -> str:
        """With these colours."""
        claim = self.scene.claim
        one, other = (f"a {g.size} {c} {g.shape}" for g, c in ((self.first, first), (self.second, second)))
        return f"{one} {self.between} {other} on a {claim.texture} {claim.background} background"

    def could_be_shown(self, first: str, second: str) -> bool:
        groups = self.first._replace(colour=first), self.second._replace(colour=second)
        return not unseen_kinds(self.scene.claim._replace(groups=groups))


def twos(num: int, seed: int) -> Iterator[Two]:
    index = 0
    while num:
        scene = scene_row("validation", index, seed).scene
        index += 1
        if scene.claim.kind not in ("relation", "pair"):
            continue
        first, second = scene.claim.groups
        if first.shape != second.shape and first.colour != second.colour:
            yield Two(scene, first, second, scene.claim.relation or "and")
            num -= 1


def swapped_of_two(pipe: Pipeline, num: int, which: str) -> dict[str, Any]:
    """Which of two things takes another colour after each swap of the colour word of "first", of "second", or of
    "both", which are exchanged. Told apart are scenes whose own picture is right, and those in which the two things
    have exchanged their colours; things are known by their shapes."""
    stream, pairs = random.Random(f"two {which}"), []
    for two in twos(num, 5):
        own = two.first.colour, two.second.colour
        if which == "both":
            choices = [own[::-1]]
        else:
            free = [colour for colour in COLOURS if colour not in own]
            choices = [(colour, own[1]) if which == "first" else (own[0], colour) for colour in free]
        choices = [choice for choice in choices if two.could_be_shown(*choice)]
        if choices:
            pairs.append((two, own, stream.choice(choices)))
    swaps, num_words = swaps_of(pipe), 1 + (which == "both")
    names = ("its own caption", "the other caption", *swaps)

    def is_one_id(two: Two, own: tuple[str, str], other: tuple[str, str]) -> bool:
        try:
            return bool(difference(pipe, two.caption(*own), two.caption(*other), num_words))
        except InputError:  # words of several pieces
            return False

    fitting = [pair for pair in pairs if is_one_id(*pair)]
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for chosen in together(fitting, lambda pair: len(pipe.text_tokenizer.encode(pair[0].caption(*pair[1])))):
        both = ([two.caption(*pair[i]) for two, *pair in chosen] for i in (0, 1))
        codes = swapped_codes(pipe, *both, list(swaps.values()), num_words=num_words)
        pictures = to_pixels(pipe.decode_images(codes.flatten(0, 1)))
        for row, (two, own, other) in enumerate(chosen):
            shown = [colours_of(picture, two) for picture in pictures[row * len(names) : (row + 1) * len(names)]]
            begun = {own: "right", own[::-1]: "exchanged"}.get(shown[0])
            for name, colours in zip(names, shown, strict=True):
                if begun is not None:
                    counts[f"{begun}: {name}"][_change(which, colours, shown[0], own, other)] += 1
    return {
        name: {"of": found.total()} | {what: f"{found[what] / found.total():.0%}" for what in CHANGES}
        for name, found in sorted(counts.items(), key=lambda item: item[0].startswith("exchanged"))
    }


CHANGES = ("first", "second", "both", "neither", "crossed", "one colour", "something else", "not read")
"""Which thing takes the colour that was swapped in. Crossed: the colours are those of the other caption, on the wrong
things where they were right, and the other way round. Or both have one colour, or are not read by their shapes."""


def colours_of(picture: np.ndarray, two: Two) -> tuple[str | None, str | None] | None:
    """The colours of the first and second thing; None if the two are not read by their shapes."""
    things = read_picture(picture).things
    if sorted(thing.shape or "" for thing in things) != sorted((two.first.shape, two.second.shape)):
        return None
    by_shape = {thing.shape: thing.colour for thing in things}
    return by_shape[two.first.shape], by_shape[two.second.shape]


def _change(which: str, now: Any, before: Any, own: tuple[str, str], other: tuple[str, str]) -> str:
    """Which things have taken the colour that was swapped in, of CHANGES."""
    new = set(other) - set(own) or set(own)
    if now is None:
        return "not read"
    if now[0] == now[1]:
        return "one colour"
    if which != "both" and (now == other[::-1] if before == own else now == other):
        return "crossed"
    moved = tuple(place for place in (0, 1) if now[place] != before[place])
    if any(now[place] not in new for place in moved):
        return "something else"
    return {(): "neither", (0,): "first", (1,): "second", (0, 1): "both"}[moved]


def cells_of(scene: Scene, num_colours: int) -> dict[str, np.ndarray]:
    """Which of the 8 × 8 cells carry colours, things, and ground alone."""
    things = np.zeros((8, 8), dtype=bool)
    for thing in scene.content.things:
        end = SIZES[thing.size or "small"]
        things[thing.top // 8 : (thing.top + end - 1) // 8 + 1, thing.left // 8 : (thing.left + end - 1) // 8 + 1] = (
            True
        )
    colours = np.zeros((8, 8), dtype=bool)
    colours[0, :num_colours] = True
    return {"palette": colours, "things": things, "ground": ~(things | colours)}


def surprise(pipe: Pipeline, num: int) -> dict[str, Any]:
    """Nats that true pictures cost more when one word of their caption is another, by where they cost it."""
    palette = getattr(pipe.image_tokenizer.config, "palette", 0)
    stream, found = random.Random("surprise"), defaultdict(list)
    for scene, words in singles(num, 2):
        picture = torch.tensor(render(scene.content)).permute(2, 0, 1)[None] / 255
        codes = pipe.encode_images(picture)
        others = {what: other_words(scene, words, what, stream) for what in CHOICES}
        changed = {what: other for what, other in others.items() if other is not None}
        captions = [caption(words), *map(caption, changed.values())]
        nats = picture_nats(pipe, codes.expand(len(captions), -1, -1), captions).numpy()
        areas = cells_of(scene, palette)
        found["none"].append([nats[0].sum(), *(nats[0][area].sum() for area in areas.values())])
        for what, given in zip(changed, nats[1:], strict=True):
            more = given - nats[0]
            found[what].append([more.sum(), *(more[area].sum() for area in areas.values())])
    columns = ("all", "palette", "things", "ground")
    return {
        what: {name: round(float(value), 3) for name, value in zip(columns, np.mean(rows, axis=0), strict=True)}
        | {"standard error": round(float(np.std([row[0] for row in rows]) / np.sqrt(len(rows))), 3)}
        for what, rows in found.items()
    }


def relation_surprise(pipe: Pipeline, num: int) -> dict[str, float]:
    """The same for a relation and its inverse."""
    more, index = [], 0
    while len(more) < num:
        scene = scene_row("validation", index, 3).scene
        index += 1
        if scene.claim.kind != "relation" or scene.claim.relation is None:
            continue
        one, other = scene.claim.groups
        first, second = (f"a {group.size} {group.colour} {group.shape}" for group in (one, other))
        codes = pipe.encode_images(torch.tensor(render(scene.content)).permute(2, 0, 1)[None] / 255)
        said = [f"{first} {r} {second}" for r in (scene.claim.relation, INVERSE[scene.claim.relation])]
        nats = picture_nats(pipe, codes.expand(2, -1, -1), said).sum((1, 2))
        more.append(float(nats[1] - nats[0]))
    right = sum(value > 0 for value in more)
    return {"mean nats": round(float(np.mean(more)), 3), "right one likelier": str(Share(right, len(more)))}


def attention(pipe: Pipeline, num: int) -> dict[str, Any]:
    """Share of attention from cells of each kind to each kind of word: mean of all heads, and the head with most."""
    palette = getattr(pipe.image_tokenizer.config, "palette", 0)
    sums: dict[tuple[str, str], list[np.ndarray]] = defaultdict(list)
    for scene, words in singles(num, 4):
        text = caption(words)
        pieces = [pipe.text_tokenizer.decode([token_id]).strip() for token_id in pipe.text_tokenizer.encode(text)]
        places = {what: pieces.index(words[what]) for what in CHOICES if pieces.count(words[what]) == 1}
        if len(places) < len(CHOICES):  # a word of several pieces
            continue
        codes = pipe.encode_images(torch.tensor(render(scene.content)).permute(2, 0, 1)[None] / 255)[0]
        shares = attention_to_text(pipe, codes, text).numpy()  # (layers, N, cells, L)
        for area, mask in cells_of(scene, palette).items():
            for word, i in places.items():
                sums[area, word].append(shares[:, :, mask.ravel(), i].mean(2))
    found = {}
    for (area, word), rows in sums.items():
        heads = np.mean(rows, axis=0)
        layer, head = np.unravel_index(heads.argmax(), heads.shape)
        found[f"{area} to {word}"] = {
            "mean": round(float(heads.mean()), 4),
            "most": round(float(heads.max()), 3),
            "head": f"{layer}.{head}",
        }
    return found


def markdown(title: str, rows: dict[str, Any]) -> str:
    rows = {name: row if isinstance(row, dict) else {"": row} for name, row in rows.items()}
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    lines = [f"| {title} | {' | '.join(columns)} |", f"|---{'|---' * len(columns)}|"]
    lines += [f"| {name} | {' | '.join(str(row.get(key, '')) for key in columns)} |" for name, row in rows.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--num", type=int, default=100, help="scenes of each experiment")
    parser.add_argument("--quick", action="store_true", help="a tenth of them")
    given = parser.parse_args()
    num = max(4, given.num // 10) if given.quick else given.num
    pipe = Pipeline.load(given.bundle)
    found: dict[str, Any] = {"bundle": pipe.name, "weights_sha256": pipe.weights_sha256, "num": num}
    for what in ("colour", "shape", "size"):
        found[f"swapped {what}"] = swapped(pipe, num, what)
        print(markdown(f"swapped {what}", found[f"swapped {what}"]), "\n", flush=True)
    for which in ("first", "second", "both"):
        found[f"two things, {which}"] = swapped_of_two(pipe, num, which)
        print(markdown(f"colour of {which}, changes", found[f"two things, {which}"]), "\n", flush=True)
    found["contradicted word"] = surprise(pipe, num)
    print(markdown("contradicted word", found["contradicted word"]), "\n", flush=True)
    found["contradicted relation"] = relation_surprise(pipe, num)
    print(markdown("contradicted relation", found["contradicted relation"]), "\n", flush=True)
    found["attention"] = attention(pipe, num)
    print(markdown("attention", found["attention"]), flush=True)
    if given.output:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
