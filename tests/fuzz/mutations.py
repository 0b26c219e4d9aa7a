"""Damage that knows its format: what a mutator changes can still be read far enough to reach the code behind checks.

Every function takes a `random.Random` and a whole, good sample and returns a damaged one. The same generator state
gives the same bytes, so that a number names an input.
"""

import io
import json
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from random import Random
from typing import Any

Mutator = Callable[[Random, bytes], bytes]

NUMBERS = (
    0, 1, -1, 2, 7, 255, 256, 65_535, 65_536, 2**31 - 1, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 10**12,
    10**30, -(2**63), 0.0, -0.0, 0.5, 1.5, 1e300, -1e300, float("inf"), float("nan"),
)  # fmt: skip
TEXTS = ("", " ", "x", "null", "\x00", "é", "\ud800", "🎉", "a" * 300, "../../x", "/etc/passwd", "1", "-1", "nan",
         "<bos>", "image{49}", "digits", "\u202e", "%s", "{0}", "-", "--", "[" * 200)  # fmt: skip


def odd_value(random: Random) -> Any:
    """A value that a field was not meant to have."""
    choice = random.randrange(9)
    if choice < 3:
        return random.choice(NUMBERS)
    if choice < 5:
        return random.choice(TEXTS)
    return random.choice((None, True, False, [], {}, [0], [0, 0], {"x": 1}, [[]], [None], {"": {}}, ["a", 1, None]))


def flip_bytes(random: Random, content: bytes) -> bytes:
    """Some bytes changed, cut out, repeated or put in; or the end cut off."""
    found = bytearray(content)
    for _ in range(random.choice((1, 1, 1, 2, 4, 16))):
        at = random.randrange(len(found) + 1)
        if random.random() < 0.3:  # headers stand at the ends
            at = min(len(found), int(random.random() ** 3 * len(found)))
        elif random.random() < 0.3:
            at = max(0, len(found) - 1 - int(random.random() ** 3 * len(found)))
        kind = random.randrange(8)
        if kind < 3 and at < len(found):
            found[at] ^= 1 << random.randrange(8)
        elif kind == 3 and at < len(found):
            found[at] = random.choice((0, 1, 127, 128, 255))
        elif kind == 4:
            del found[at : at + random.choice((1, 2, 8, 64))]
        elif kind == 5:
            found[at:at] = bytes(random.randrange(256) for _ in range(random.choice((1, 2, 8))))
        elif kind == 6:
            part = found[at : at + random.choice((1, 4, 32))]
            found[at:at] = part * random.choice((1, 2, 3))
        else:
            width = random.choice((1, 2, 4, 8))
            number = random.choice([n for n in NUMBERS if isinstance(n, int)]) % 2 ** (8 * width)
            found[at : at + width] = number.to_bytes(width, random.choice(("little", "big")))
    return bytes(found[: random.randrange(len(found) + 1)]) if random.random() < 0.05 else bytes(found)


def mutate_tree(random: Random, value: Any) -> Any:
    """A JSON value with one to three places changed."""
    value = json.loads(json.dumps(value))
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            return odd_value(random)
        holder, key = random.choice(places)
        kind = random.randrange(10)
        if kind < 5:
            holder[key] = odd_value(random)
        elif kind == 5:
            del holder[key]
        elif kind == 6 and isinstance(holder, dict):
            holder[random.choice(TEXTS)] = odd_value(random)
        elif kind == 7 and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
            holder[key] = random.choice((holder[key] + 1, holder[key] - 1, -holder[key], holder[key] * 10**6, 0))
        elif kind == 8:
            holder[key] = random.choice(places)[0]
            try:
                json.dumps(value)
            except (ValueError, RecursionError):  # it holds itself
                holder[key] = None
        else:
            holder[key] = random.choice((str(holder[key])[:200], [holder[key]], {"x": holder[key]}))
    return value


def _places(value: Any):
    if isinstance(value, dict):
        for key in list(value):
            yield value, key
            yield from _places(value[key])
    elif isinstance(value, list):
        for index in range(min(len(value), 40)):
            yield value, index
            yield from _places(value[index])


def mutate_json(random: Random, content: bytes) -> bytes:
    choice = random.random()
    if choice < 0.1:
        return flip_bytes(random, content)
    if choice < 0.12:
        depth = random.choice((50, 1000, 100_000))
        return random.choice((b"[" * depth, b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth))
    if choice < 0.14:  # deep inside
        depth = random.choice((200, 1500, 30_000))
        text = json.dumps(mutate_tree(random, json.loads(content))).encode()
        at = text.rfind(b":") + 1
        return text[:at] + b"[" * depth + b"]" * depth + b"}" * (text.count(b"{") - text.count(b"}"))
    text = json.dumps(mutate_tree(random, json.loads(content)), ensure_ascii=random.random() < 0.8)
    return text.encode("utf-8", errors="surrogatepass")


def mutate_words(random: Random, content: bytes, odd: tuple[str, ...] = ()) -> bytes:
    """Text whose words, lines or characters are changed."""
    lines = content.split(b"\n")
    for _ in range(random.choice((1, 1, 2, 5))):
        row = random.randrange(len(lines))
        kind = random.randrange(9)
        words = lines[row].split(b" ")
        if kind < 3:
            replacement = random.choice(odd) if odd and random.random() < 0.5 else str(odd_value(random))
            words[random.randrange(len(words))] = replacement.encode("utf-8", errors="surrogatepass")
            lines[row] = b" ".join(words)
        elif kind == 3:
            del words[random.randrange(len(words))]
            lines[row] = b" ".join(words)
        elif kind == 4:
            lines[row] = b" ".join(random.sample(words, len(words)))
        elif kind == 5:
            lines.insert(row, random.choice(lines))
        elif kind == 6 and len(lines) > 1:
            del lines[row]
        elif kind == 7:
            lines[row] = flip_bytes(random, lines[row])
        else:
            lines[row] += random.choice((b"\r", b"\x00", b"\t", b'"', b",", b"'", b"\xff", b"\xe2\x80\xa8", b"{", b"("))
    return b"\n".join(lines)


YAML_ODD = (
    "!!bool abc", "!!int x", "!!float y", "!!timestamp 9999-99-99", "!!binary '*'", "!!python/object:os.system {}",
    "&a [*a]", "*nothing", "2026-99-99", "1:99:99", "0x", "0o9", ".nan", ".inf", "- - -", "? [a]", "{a: {b: {c: 1}}}",
    "!!set {1, 2}", "!!omap [1]", "!!pairs x", "<<: 1", "[0, 0]", "null", "~", "yes", "1e400", "!!null x", "!!str [a]",
    "1" * 5000, "|", ">", "'", '"', "%TAG", "---", "...", "\t",
)  # fmt: skip


def mutate_yaml(random: Random, content: bytes) -> bytes:
    choice = random.random()
    if choice < 0.15:
        return flip_bytes(random, content)
    if choice < 0.18:
        depth = random.choice((50, 500, 5000))
        return random.choice((b"[" * depth + b"]" * depth, b"{a: " * depth, b"a: " + b"- " * depth))
    if choice < 0.183:  # aliases that double: each takes a second
        return b"a0: &a0 [x, x]\n" + b"".join(b"a%d: &a%d [*a%d, *a%d]\n" % (i, i, i - 1, i - 1) for i in range(1, 30))
    lines = content.split(b"\n")
    for _ in range(random.choice((1, 1, 2))):
        row = random.randrange(len(lines))
        key, colon, _ = lines[row].partition(b":")
        odd = random.choice(YAML_ODD) if random.random() < 0.6 else json.dumps(odd_value(random))
        if colon and random.random() < 0.7:
            lines[row] = key + b": " + odd.encode("utf-8", errors="surrogatepass")
        else:
            lines = mutate_words(random, b"\n".join(lines), YAML_ODD).split(b"\n")
    return b"\n".join(lines)


def mutate_safetensors(random: Random, content: bytes) -> bytes:
    choice = random.random()
    if choice < 0.2:
        return flip_bytes(random, content)
    size = struct.unpack("<Q", content[:8])[0]
    header, payload = content[8 : 8 + size], content[8 + size :]
    if choice < 0.4:
        payload = flip_bytes(random, payload)
    elif choice < 0.5:
        at = random.randrange(max(1, len(payload) // 4)) * 4
        odd = random.choice((float("nan"), float("inf"), 3e38, 1e-40))
        payload = payload[:at] + struct.pack("<f", odd) + payload[at + 4 :]
    else:
        header = mutate_json(random, header) if random.random() < 0.7 else _other_dtype(random, header)
        header += b" " * (-len(header) % 8)
    length = len(header) if random.random() < 0.95 else random.choice((0, 2**63, 2**40, len(header) + 1, 2**64 - 1))
    return struct.pack("<Q", length) + header + payload


def _other_dtype(random: Random, header: bytes) -> bytes:
    tree = json.loads(header)
    name = random.choice([name for name in tree if name != "__metadata__"])
    tree[name]["dtype"] = random.choice(("F64", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "C64", "U64"))
    if random.random() < 0.5:
        tree[name]["shape"] = [1, *tree[name]["shape"]][: random.choice((1, 2, 3))]
    return json.dumps(tree).encode()


def mutate_zip(random: Random, content: bytes) -> bytes:
    """A zip file (.pt, .npz) whose members are changed and whose checksums are right again; or plain damage."""
    if random.random() < 0.35:
        return flip_bytes(random, content)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    name = random.choice(sorted(members))
    if random.random() < 0.6:
        name = next((name for name in members if name.endswith("data.pkl")), name)
    kind = random.random()
    if kind < 0.75:
        members[name] = flip_bytes(random, members[name])
    elif kind < 0.85:
        members[name] = members[name][:10] + bytes(len(members[name][10:]))
    elif kind < 0.95:
        del members[name]
    else:
        members[random.choice(TEXTS) or "x"] = members[name]
    output = io.BytesIO()
    with zipfile.ZipFile(output, "w") as archive:
        for member, held in members.items():
            archive.writestr(member.replace("\0", "").encode("utf-8", "replace").decode() or "x", held)
    return output.getvalue()


def mutate_tar(random: Random, content: bytes) -> bytes:
    """A tar file with header fields changed and header checksums right again."""
    if random.random() < 0.25:
        return flip_bytes(random, content)
    found = bytearray(content)
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        headers = [(member.offset, member.offset_data, member.size) for member in archive]
    for _ in range(random.choice((1, 1, 2))):
        at, data, size = random.choice(headers)
        kind = random.randrange(6)
        if kind == 0:
            found[at + 124 : at + 136] = random.choice(
                (b"77777777777\x00", b"00000000000\x00", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"            ", 
                 b"-0000000001\x00", b"\x80\x00\x00\x00\x7f\xff\xff\xff\xff\xff\xff\xff", b"00017777777\x00")
            )  # fmt: skip
        elif kind == 1:
            found[at + 156 : at + 157] = random.choice((b"0", b"1", b"2", b"5", b"L", b"K", b"x", b"g", b"S", b"\xff"))
        elif kind == 2:
            name = random.choice(TEXTS).encode("utf-8", "surrogatepass")[:100]
            found[at : at + 100] = name.ljust(100, b"\0")
        elif kind == 3:
            found[data : data + size] = flip_bytes(random, bytes(found[data : data + size]))[:size].ljust(size, b"\0")
        elif kind == 4:
            field = random.randrange(100, 500)
            found[at + field] = random.randrange(256)
        else:
            filling = random.choice((b"[", b"\xff", b"{", b"\x00"))
            found[data : data + size] = filling * size
        header = bytearray(found[at : at + 512])
        header[148:156] = b" " * 8
        found[at + 148 : at + 156] = b"%06o\0 " % sum(header)
    return bytes(found)


def mutate_png(random: Random, content: bytes) -> bytes:
    """A PNG with the content of a chunk changed and its checksum right again."""
    if random.random() < 0.2:
        return flip_bytes(random, content)
    chunks, at = [], 8
    while at + 12 <= len(content):
        (size,) = struct.unpack(">I", content[at : at + 4])
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + size]))
        at += 12 + size
    index = random.randrange(len(chunks))
    if random.random() < 0.6:
        index = next((i for i, (kind, _) in enumerate(chunks) if kind == b"iTXt"), index)
    kind, held = chunks[index]
    start = held.find(b"{")
    if kind == b"iTXt" and start >= 0 and random.random() < 0.85:
        held = held[:start] + mutate_json(random, held[start:])
    elif held:
        held = flip_bytes(random, held)
    if random.random() < 0.1:
        kind = random.choice((b"iTXt", b"tEXt", b"zTXt", b"eXIf", b"iCCP", b"tRNS", b"PLTE", b"IDAT", b"acTL", b"fcTL"))
    chunks[index] = kind, held
    if random.random() < 0.05:
        chunks.insert(index, random.choice(chunks))
    return content[:8] + b"".join(
        struct.pack(">I", len(held)) + kind + held + struct.pack(">I", zlib.crc32(kind + held)) for kind, held in chunks
    )


def mutate_parquet(random: Random, content: bytes) -> bytes:
    """Plain damage, most of it in the footer and in what lies before it."""
    if random.random() < 0.3:
        return flip_bytes(random, content)
    size = struct.unpack("<I", content[-8:-4])[0]
    start = len(content) - 8 - size
    head, footer = content[:start], content[start:-8]
    if random.random() < 0.6:
        footer = flip_bytes(random, footer)
        if random.random() < 0.5:
            footer = footer[:size].ljust(size, b"\0")  # lengths elsewhere still agree
    else:
        head = head[:4] + flip_bytes(random, head[4:])[: len(head) - 4].ljust(len(head) - 4, b"\0")
    return head + footer + struct.pack("<I", len(footer)) + content[-4:]
