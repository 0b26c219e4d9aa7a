"""Token tables that are read as they come, without a copy on disk: from the Hugging Face hub, through `datasets`.

A stream is shuffled as it is read: every epoch takes the row groups of all files in an order of its own and deals them
out to lanes; each lane cuts its rows into blocks, permutes each block, and lanes take turns in the places of the
stream. Orders and permutations are drawn from (seed, epoch, lane, block), and the files' own footers say how many rows
there are: so place p of the stream is the same row in every run, and a training that goes on at place p opens the one
row group a lane that holds it. Processes take turns in the places too; joined, their rows are those that one process
would see, however many there are. What they read is their own where their number divides that of the lanes: of two
processes one reads every other lane.
Letters in shapes: n rows asked for, L the length of the longest of them.
"""

import itertools
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any, NamedTuple, cast

import numpy as np
import pyarrow as pa
from jaxtyping import Int32, Int64, Integer

from smalti.data.parquet_files import ParquetReader
from smalti.data.tokens import PAD, TokenBatch, check_columns, read_metadata, token_values
from smalti.errors import InputError, InputWarning, first_line
from smalti.text_tokenizer import TextTokenizer

LANES = 8
"""At most, and a power of two: as many row groups are open at once, and so many processes read nothing twice."""
BLOCK_ROWS = 65_536
"""Rows that are shuffled among each other, of all lanes together, and held in memory; twice as many at most."""
_ROWS_AT_ONCE = 8192


class TokenStream:
    """The rows of a split by their place in an endless stream, epoch after epoch; made by `open`.

    Cheap where places ascend, as in a training; another place is sought in its row group.
    """

    def __init__(
        self,
        rows: Any,
        row_groups: list["_RowGroup"],
        checks: "_Checks",
        metadata: Mapping[str, Any],
        *,
        seed: int,
        text_tokenizer: TextTokenizer | None,
    ):
        self.metadata = dict(metadata)
        self._rows, self._row_groups, self._checks = rows, row_groups, checks
        self._seed, self._text_tokenizer = seed, text_tokenizer
        self._num_rows = sum(group.num_rows for group in row_groups)
        num_lanes = min(LANES, 1 << (len(row_groups).bit_length() - 1))
        self._block_rows = max(1, BLOCK_ROWS // num_lanes)
        self._lanes = [_Lane(self, number) for number in range(num_lanes)]
        self._deals: dict[int, _Deal] = {}
        self._has_warned = False

    @classmethod
    def open(
        cls,
        name: str,
        split: str = "train",
        *,
        seed: int = 0,
        image_length: int | None = None,
        image_vocab_size: int | None = None,
        text_vocab_size: int | None = None,
        text_tokenizer: TextTokenizer | None = None,
        max_text_length: int | None = None,
    ) -> "TokenStream":
        """A split of the hub's data set `owner/name` (or `owner/name@revision`), or of a local folder of parquet files.

        With a text tokenizer the captions' `text` is encoded, and `text_tokens` are left aside.

        Only footers are read here. As rows come, each must have `image_length` image tokens in [0, image_vocab_size)
        and text tokens in [0, text_vocab_size), if given; longer captions are cut to `max_text_length` tokens, and a
        warning counts those of the first block that has some. Raises InputError where there is no such data set or
        split, its files are no token tables, or a row fails validation, naming file and row. Needs the extra
        "data".
        """
        library = _import_datasets()
        path, _, revision = name.partition("@")
        with _named_errors(name):
            columns = ["image_tokens", "text" if text_tokenizer else "text_tokens"]
            builder = library.load_dataset_builder(path, revision=revision or None, columns=columns)
            urls = (builder.config.data_files or {}).get(split)
            if not urls:
                splits = ", ".join(builder.config.data_files or {})
                raise InputError(f"the data set {name} has no split {split!r}; it has {splits or 'none'}.")
            row_groups, metadata = _read_footers(list(map(str, urls)), columns)
            rows = builder.as_streaming_dataset(split).with_format("arrow").reshard()  # by row group
        if rows.num_shards != len(row_groups):
            raise AssertionError(f"{rows.num_shards} shards of {len(row_groups)} row groups")
        if not sum(group.num_rows for group in row_groups):
            raise InputError(f"the split {split!r} of {name} holds no rows.")
        checks = _Checks(
            image_length, {"image_tokens": image_vocab_size, "text_tokens": text_vocab_size}, max_text_length
        )
        return cls(rows, row_groups, checks, metadata, seed=seed, text_tokenizer=text_tokenizer)

    def __len__(self) -> int:
        """Rows of an epoch."""
        return self._num_rows

    def batch(self, rows: Integer[np.ndarray, " n"]) -> TokenBatch:
        """The rows at these places of the stream; place `len(stream)` is the first of the second epoch."""
        if len(rows) and rows.min() < 0:
            raise ValueError(f"place {rows.min()} of a stream; places count from 0.")
        epochs, places = np.divmod(rows, self._num_rows)
        found = []
        for epoch in np.unique(epochs).tolist():
            of_epoch = np.flatnonzero(epochs == epoch)
            lanes, numbers = self._deal(epoch).find(places[of_epoch])
            for lane in np.unique(lanes).tolist():
                of_lane = lanes == lane
                found += self._lanes[lane].rows(epoch, numbers[of_lane], of_epoch[of_lane])
        return TokenBatch(
            *_joined([(which, part.image_tokens, part.image_lengths) for which, part in found], len(rows)),
            *_joined([(which, part.text_tokens, part.text_lengths) for which, part in found], len(rows)),
        )

    def _deal(self, epoch: int) -> "_Deal":
        if epoch not in self._deals:
            if len(self._deals) > 1:  # a batch may reach from one epoch into the next
                del self._deals[next(iter(self._deals))]
            order = np.random.default_rng([self._seed, epoch, 0]).permutation(len(self._row_groups)).tolist()
            self._deals[epoch] = _Deal([self._row_groups[index].num_rows for index in order], order, len(self._lanes))
        return self._deals[epoch]

    def _row_group(self, index: int) -> pa.Table:
        """Read whole at once: a reader that is left open can hang the interpreter when it ends (apache/arrow#45214)."""
        group = self._row_groups[index]
        with _named_errors(group.url):
            parts = list(self._rows.shard(num_shards=len(self._row_groups), index=index).iter(_ROWS_AT_ONCE))
            table = self._encoded(pa.concat_tables(parts))
            self._checks.require(table, group.url, group.first_row)
        if table.num_rows != group.num_rows:
            raise InputError(
                f"{group.url} gave {table.num_rows} rows, its footer says {group.num_rows}; fetch or make it again."
            )
        return table

    def _encoded(self, table: pa.Table) -> pa.Table:
        if self._text_tokenizer is None:
            return table
        numbers = [self._text_tokenizer.encode(text or "") for text in table["text"].to_pylist()]
        return table.drop_columns("text").append_column("text_tokens", pa.array(numbers, pa.list_(pa.int64())))

    def _decoded(self, table: pa.Table) -> "_Block":
        image_tokens, image_lengths = _padded(table, "image_tokens")
        text_tokens, text_lengths = _padded(table, "text_tokens")
        most = self._checks.max_text_length
        if most is not None and text_tokens.shape[1] > most:
            if not self._has_warned:
                self._has_warned = True
                num_cut = int((text_lengths > most).sum())
                warnings.warn(
                    f"{num_cut} of the {table.num_rows} captions just read are cut to {most} tokens, and so are "
                    "longer ones behind them.",
                    InputWarning,
                    stacklevel=2,
                )
            text_tokens, text_lengths = text_tokens[:, :most], text_lengths.clip(max=most)
        return _Block(image_tokens, image_lengths, text_tokens, text_lengths)


class _Deal:
    """How an epoch's row groups, in its order, are dealt out: each to the lane that has the fewest rows so far.

    Lanes take turns; one that has no more rows is passed over.
    """

    def __init__(self, sizes: list[int], order: list[int], num_lanes: int):
        self.row_groups: list[list[int]] = [[] for _ in range(num_lanes)]
        """Of each lane, in the order in which they are read."""
        self.num_rows = [0] * num_lanes
        for index, size in zip(order, sizes, strict=True):
            lane = self.num_rows.index(min(self.num_rows))
            self.row_groups[lane].append(index)
            self.num_rows[lane] += size
        # Between two lengths the same lanes take turns.
        self._rounds = [0, *sorted(set(self.num_rows) - {0})]
        self._turns = [np.flatnonzero(np.array(self.num_rows) > done) for done in self._rounds[:-1]]
        spans = zip(itertools.pairwise(self._rounds), self._turns, strict=True)
        counts = [(end - start) * len(lanes) for (start, end), lanes in spans]
        self._starts = np.cumsum([0, *counts])

    def find(self, places: Integer[np.ndarray, " n"]) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """The lane of each place of the epoch, and the number of its row there."""
        stretches = np.searchsorted(self._starts, places, side="right") - 1
        lanes, numbers = np.empty(len(places), np.int64), np.empty(len(places), np.int64)
        for stretch in np.unique(stretches).tolist():
            which, turns = stretches == stretch, self._turns[stretch]
            rounds, turn = np.divmod(places[which] - self._starts[stretch], len(turns))
            lanes[which], numbers[which] = turns[turn], self._rounds[stretch] + rounds
        return lanes, numbers


class _Lane:
    """The blocks of a lane, epoch after epoch; two are held at most."""

    def __init__(self, stream: TokenStream, number: int):
        self.stream, self.number = stream, number
        self._blocks: dict[tuple[int, int], _Block] = {}
        self._coming: Iterator[_Block] = iter(())
        self._next = (-1, 0)

    def rows(
        self, epoch: int, numbers: Int64[np.ndarray, " n"], which: Int64[np.ndarray, " n"]
    ) -> list[tuple[Int64[np.ndarray, " m"], "_Block"]]:
        """The lane's rows of these numbers in an epoch, block by block, each with its part of `which`."""
        size = self.stream._block_rows
        return [
            (which[numbers // size == block], self._block(epoch, block).take(numbers[numbers // size == block] % size))
            for block in np.unique(numbers // size).tolist()
        ]

    def _block(self, epoch: int, block: int) -> "_Block":
        if (epoch, block) not in self._blocks:
            if (epoch, block) != self._next:
                self._coming = self._blocks_from(epoch, block)
            while len(self._blocks) > 1:  # a batch may reach from one block into the next
                del self._blocks[next(iter(self._blocks))]
            self._next = (-1, 0)  # of a stream that breaks off here, the block is sought again
            self._blocks[epoch, block] = next(self._coming)
            is_last = (block + 1) * self.stream._block_rows >= self.stream._deal(epoch).num_rows[self.number]
            self._next = (epoch + 1, 0) if is_last else (epoch, block + 1)
        return self._blocks[epoch, block]

    def _blocks_from(self, first_epoch: int, first_block: int) -> Iterator["_Block"]:
        stream, size = self.stream, self.stream._block_rows
        for epoch in itertools.count(first_epoch):
            block = first_block if epoch == first_epoch else 0
            for table in _in_blocks(self._tables(epoch, block * size), size):
                key = [stream._seed, epoch, 1, self.number, block]
                yield stream._decoded(table).take(np.random.default_rng(key).permutation(table.num_rows))
                block += 1

    def _tables(self, epoch: int, start: int) -> Iterator[pa.Table]:
        """The lane's rows of an epoch from number `start` on, before they are permuted."""
        for index in self.stream._deal(epoch).row_groups[self.number]:
            num_rows = self.stream._row_groups[index].num_rows
            if start < num_rows:
                yield self.stream._row_group(index).slice(start)
            start = max(start - num_rows, 0)


class _RowGroup(NamedTuple):
    url: str
    first_row: int
    num_rows: int


class _Block(NamedTuple):
    """Rows in memory, short ones filled up with -1, in half the bytes of a TokenBatch."""

    image_tokens: Int32[np.ndarray, "n L"]
    image_lengths: Int64[np.ndarray, " n"]
    text_tokens: Int32[np.ndarray, "n Lt"]
    text_lengths: Int64[np.ndarray, " n"]

    def take(self, rows: Integer[np.ndarray, " n"]) -> "_Block":
        return _Block(*(column[rows] for column in self))


class _Checks(NamedTuple):
    image_length: int | None
    vocab_sizes: dict[str, int | None]
    max_text_length: int | None

    def require(self, table: pa.Table, url: str, first_row: int) -> None:
        """Raises InputError naming the first row that fails validation."""
        for name, vocab_size in self.vocab_sizes.items():
            lengths, values = token_values(table[name].combine_chunks(), url, first_row, name)
            if name == "image_tokens" and self.image_length is not None and (lengths != self.image_length).any():
                row = int(np.flatnonzero(lengths != self.image_length)[0])
                raise InputError(
                    f"{url}, row {first_row + row}: image_tokens has {lengths[row]} tokens, expected "
                    f"{self.image_length}."
                )
            limit = 2**31 if vocab_size is None else vocab_size
            if values.max(initial=-1) >= limit:
                index = int(np.flatnonzero(values >= limit)[0])
                row = first_row + int(np.searchsorted(np.cumsum(lengths), index, side="right"))
                raise InputError(
                    f"{url}, row {row}: {name} has the value {values[index]}, expected 0 to {limit - 1}. The "
                    "data set was made with another vocabulary."
                )


def _import_datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise InputError("this needs datasets, which is an extra: pip install 'smalti[data]'.") from error
    return datasets


@contextmanager
def _named_errors(name: str) -> Iterator[None]:
    """Raises InputError naming the data set or file for whatever goes wrong on the way to it."""
    try:
        yield
    except InputError:
        raise
    except (
        pa.ArrowException,
        OSError,
        ValueError,
    ) as error:  # the hub's errors are OSErrors, those of `datasets` either
        raise InputError(
            f"{name} cannot be read: {first_line(error)}. Look for the name on the hub, or fetch the file again."
        ) from error


def _read_footers(urls: list[str], columns: list[str]) -> tuple[list[_RowGroup], dict[str, Any]]:
    """The row groups of all files, and what their writer said of the tokens, in which all must agree."""
    import fsspec  # comes with `datasets`; it opens the hub's files as local ones

    row_groups, common = [], None
    for url in urls:
        with _named_errors(url), fsspec.open(url, "rb") as opened:
            reader = ParquetReader(url, opened=cast(IO[bytes], opened))
            check_columns(reader.schema, url, columns)
            metadata, counts = read_metadata(reader), reader.group_rows
        if common is not None and metadata != common:
            raise InputError(f"{url} was made with another tokenizer than {urls[0]}: {metadata} and {common}.")
        common = metadata
        first_rows = itertools.accumulate(counts, initial=0)
        row_groups += [_RowGroup(url, first, count) for first, count in zip(first_rows, counts, strict=False)]
    assert common is not None
    return row_groups, common


def _in_blocks(tables: Iterator[pa.Table], size: int) -> Iterator[pa.Table]:
    waiting: list[pa.Table] = []
    num_waiting = 0
    for table in tables:
        waiting.append(table)
        num_waiting += table.num_rows
        while num_waiting >= size:
            joined = pa.concat_tables(waiting)
            yield joined.slice(0, size)
            waiting, num_waiting = [joined.slice(size)], num_waiting - size
    if num_waiting:
        yield pa.concat_tables(waiting)


def _padded(table: pa.Table, name: str) -> tuple[Int32[np.ndarray, "n L"], Int64[np.ndarray, " n"]]:
    lengths, values = token_values(table[name].combine_chunks(), name, 0, name)
    inside = np.arange(lengths.max(initial=0)) < lengths[:, None]
    padded = np.full(inside.shape, PAD, np.int32)
    padded[inside] = values
    return padded, lengths


def _joined(
    parts: list[tuple[Any, Int32[np.ndarray, "m L"], Int64[np.ndarray, " m"]]], num_rows: int
) -> tuple[Int64[np.ndarray, "n L"], Int64[np.ndarray, " n"]]:
    """Rows of several blocks in the places that were asked for, padded to the longest."""
    lengths = np.zeros(num_rows, np.int64)
    for which, _, found in parts:
        lengths[which] = found
    padded = np.full((num_rows, lengths.max(initial=0)), PAD, np.int64)
    for which, tokens, found in parts:
        width = found.max(initial=0)
        padded[which, :width] = tokens[:, :width]
    return padded, lengths
