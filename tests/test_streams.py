"""Streams of a data set in the card's schema, through `datasets`, from a folder laid out as on the hub."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from training_runs import SHAPE, arrays

from smalti.data import streams
from smalti.data.loader import step_rows
from smalti.data.streams import TokenStream, _Deal
from smalti.data.tokens import TokenBatch
from smalti.errors import InputError
from smalti.sequences.layout import Layout
from smalti.sequences.vocabulary import Vocabulary
from smalti.training.token_model import TrainConfig, micro_batches, train_model

pytest.importorskip("datasets")

COUNTS = (7, 19, 3)
NUM = sum(COUNTS)
LAYOUT = Layout.parse(
    Vocabulary({"special": ["<image>"], "image": 200, "text": 7}), {"t2i": "text{..4} <image> image{5}"}
)


def rows_of(numbers: range) -> dict[str, list]:
    """Row i has the codes i, i + 1, …, and i % 4 words: it tells its number."""
    return {
        "__key__": [f"{i:09d}" for i in numbers],
        "image_tokens": [[i, i + 1, i + 2, i + 3, i + 4] for i in numbers],
        "text_tokens": [[i % 7] * (i % 4) for i in numbers],
        "text": [f"caption {i}" for i in numbers],
        "data": [json.dumps({"url": "x" * i}) for i in numbers],
    }


def write_set(folder: Path, change=None) -> Path:
    """The card's files: data/train-*, data/validation-*; `change` may spoil the rows of a file."""
    (folder / "data").mkdir(parents=True)
    ends = list(itertools.accumulate(COUNTS, initial=0))
    for i, (start, end) in enumerate(itertools.pairwise(ends)):
        rows = rows_of(range(start, end))
        if change is not None:
            change(i, rows)
        path = folder / "data" / f"train-{i:05d}-of-00003.parquet"
        pq.write_table(pa.table(rows), path, row_group_size=5)
    pq.write_table(pa.table(rows_of(range(100, 104))), folder / "data" / "validation-00000-of-00001.parquet")
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """The folder of a data set; blocks so small that there are several in an epoch, none of a whole file."""
    monkeypatch.setattr(streams, "BLOCK_ROWS", 8)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    return write_set(tmp_path / "set")


def numbers(batch: TokenBatch) -> list[int]:
    """Which rows these are; fails unless each is whole."""
    for codes, words, length in zip(batch.image_tokens, batch.text_tokens, batch.text_lengths, strict=True):
        assert (codes == codes[0] + np.arange(5)).all()
        assert length == codes[0] % 4
        assert (words[:length] == codes[0] % 7).all() and (words[length:] == -1).all()
    assert (batch.image_lengths == 5).all()
    return batch.image_tokens[:, 0].tolist()


def test_an_epoch_holds_every_row_once_and_each_another_order(hub: Path):
    stream = TokenStream.open(str(hub), seed=3)
    assert len(stream) == NUM
    epochs = [numbers(stream.batch(np.arange(epoch * NUM, (epoch + 1) * NUM))) for epoch in range(4)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(NUM))] * 4
    assert len({tuple(epoch) for epoch in epochs}) == 4
    other = TokenStream.open(str(hub), seed=4)
    assert numbers(other.batch(np.arange(NUM))) != epochs[0]
    # rows of one file are not left together: shuffled within and across files
    assert any(np.diff(epochs[0][:8]) != 1)
    assert {i // 7 for i in epochs[0][:8]} != {0}


def test_splits_are_those_of_the_files(hub: Path):
    validation = TokenStream.open(str(hub), "validation")
    assert sorted(numbers(validation.batch(np.arange(4)))) == [100, 101, 102, 103]
    with pytest.raises(InputError, match=r"has no split 'test'; it has train, validation"):
        TokenStream.open(str(hub), "test")


@pytest.mark.parametrize("start", [1, 7, 8, 28, 29, 30, 75])
def test_a_stream_goes_on_anywhere_as_if_it_had_never_stopped(hub: Path, start: int):
    whole = TokenStream.open(str(hub), seed=5)
    expected = [numbers(whole.batch(np.arange(at, at + 6))) for at in range(0, 96, 6)]
    flat = list(itertools.chain(*expected))
    resumed = TokenStream.open(str(hub), seed=5)
    assert numbers(resumed.batch(np.arange(start, start + 11))) == flat[start : start + 11]
    assert numbers(resumed.batch(np.arange(start + 11, start + 13))) == flat[start + 11 : start + 13]
    assert numbers(resumed.batch(np.array([2, 0, 2]))) == [flat[2], flat[0], flat[2]]  # backwards too


def test_row_groups_that_are_passed_over_are_not_read(hub: Path, monkeypatch):
    stream = TokenStream.open(str(hub), seed=5)
    read = []
    plain = TokenStream._row_group
    monkeypatch.setattr(TokenStream, "_row_group", lambda self, i: read.append(i) or plain(self, i))
    stream.batch(np.array([NUM - 1]))
    sizes = [5, 2, 5, 5, 5, 4, 3]  # of files of 7, 19 and 3 rows
    order = np.random.default_rng([5, 0, 0]).permutation(7).tolist()
    deal = _Deal([sizes[i] for i in order], order, 4)
    [lane], [number] = deal.find(np.array([NUM - 1]))
    groups = deal.row_groups[lane]
    ends = np.cumsum([sizes[i] for i in groups])
    block = number // 2 * 2  # of two rows
    assert read == [i for i, end in zip(groups, ends, strict=True) if end > block][: len(read)] and len(read) == 1


def test_a_process_that_breaks_off_ends(hub: Path):
    """Arrow's readers, left open, would keep it from ending."""
    script = (
        "import numpy as np; from smalti.data.streams import TokenStream; "
        f"stream = TokenStream.open({str(hub)!r}); print(stream.batch(np.arange(3)).image_tokens.shape)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "(3, 5)\n")


def test_processes_share_every_batch(hub: Path):
    config = TrainConfig(num_steps=9, batch_size=6)
    together = TokenStream.open(str(hub), text_vocab_size=7)
    alone = micro_batches(LAYOUT, together, config, start_step=2, rank=0, world_size=1)
    ranks = [
        micro_batches(LAYOUT, TokenStream.open(str(hub)), config, start_step=2, rank=rank, world_size=3)
        for rank in range(3)
    ]
    pictures = []
    for _ in range(5):
        [whole] = next(alone)
        shares = [next(share)[0] for share in ranks]
        assert [len(share.token_ids) for share in shares] == [2, 2, 2]
        lines = sorted(ids[ids > 0].tolist() for ids in whole.token_ids)
        assert lines == sorted(ids[ids > 0].tolist() for share in shares for ids in share.token_ids)
        pictures += lines
    assert len(pictures) == 30


@pytest.fixture
def even(tmp_path, monkeypatch) -> Path:
    """A data set of sixteen row groups of five."""
    monkeypatch.setattr(streams, "BLOCK_ROWS", 24)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    (tmp_path / "even").mkdir()
    pq.write_table(pa.table(rows_of(range(80))), tmp_path / "even" / "train.parquet", row_group_size=5)
    return tmp_path / "even"


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
def test_a_process_reads_its_own_row_groups_alone(even: Path, num_ranks: int, monkeypatch):
    """Joined, what they read is every row once an epoch, in the batches that one process has; where their number
    divides that of the lanes, no two read one row group."""
    read: list[list[int]] = [[] for _ in range(num_ranks)]
    plain = TokenStream._row_group
    monkeypatch.setattr(TokenStream, "_row_group", lambda self, i: read[self.rank].append(i) or plain(self, i))
    whole, ranks = TokenStream.open(str(even), seed=2), []
    whole.rank = 0
    batches = [numbers(whole.batch(np.arange(at, at + 24))) for at in range(0, 72, 24)]
    assert len(set(read[0])) == 16 and not read[0].clear()
    for rank in range(num_ranks):
        stream = TokenStream.open(str(even), seed=2)
        stream.rank = rank
        ranks.append([numbers(stream.batch(np.arange(at, at + 24)[rank::num_ranks])) for at in range(0, 72, 24)])
    for step, batch in enumerate(batches):
        joined = np.zeros(24, int)
        for rank in range(num_ranks):
            joined[rank::num_ranks] = ranks[rank][step]
        assert joined.tolist() == batch
    if num_ranks != 3:
        assert sorted(itertools.chain(*read)) == list(range(16))
        assert {len(found) for found in read} == {16 // num_ranks}


def test_another_number_of_processes_goes_on_with_the_same_batches(hub: Path):
    """By the step alone: three processes, from step 5 on two, from step 9 on one."""
    config = TrainConfig(num_steps=14, batch_size=6, num_micro_batches=1)
    alone = micro_batches(LAYOUT, TokenStream.open(str(hub)), config, start_step=0, rank=0, world_size=1)
    expected = [sorted(ids[ids > 0].tolist() for ids in whole.token_ids) for [whole] in itertools.islice(alone, 14)]
    found = []
    for size, start, end in ((3, 0, 5), (2, 5, 9), (1, 9, 14)):
        shares = [
            micro_batches(LAYOUT, TokenStream.open(str(hub)), config, start_step=start, rank=rank, world_size=size)
            for rank in range(size)
        ]
        for _ in range(start, end):
            pieces = [next(share)[0] for share in shares]
            found.append(sorted(ids[ids > 0].tolist() for piece in pieces for ids in piece.token_ids))
    assert found == expected


@pytest.mark.parametrize(("sizes", "num_lanes"), [([5, 2, 5, 5, 5, 4, 3], 4), ([1, 90, 1], 2), ([7], 1), ([4] * 6, 4)])
def test_lanes_take_turns_until_all_rows_are_taken(sizes: list[int], num_lanes: int):
    deal = _Deal(sizes, list(range(len(sizes))), num_lanes)
    expected, done = [], [0] * num_lanes
    while len(expected) < sum(sizes):
        for lane in range(num_lanes):
            if done[lane] < deal.num_rows[lane]:
                expected.append((lane, done[lane]))
                done[lane] += 1
    places = np.random.default_rng(0).permutation(sum(sizes))
    found = list(zip(*(part.tolist() for part in deal.find(places)), strict=True))
    assert found == [expected[place] for place in places]
    assert sorted(itertools.chain(*deal.row_groups)) == list(range(len(sizes)))
    assert [sum(sizes[i] for i in groups) for groups in deal.row_groups] == deal.num_rows


def test_a_training_on_a_stream_is_resumed_bit_for_bit(hub: Path, tmp_path, monkeypatch):
    def train(folder: str, stream: TokenStream) -> dict:
        config = TrainConfig(num_steps=11, batch_size=4, checkpoint_every=3)
        model = train_model(SHAPE, LAYOUT, stream, arrays(5), config, tmp_path / folder, show_progress=False)
        return model.state_dict()

    def fresh() -> TokenStream:
        return TokenStream.open(str(hub), image_length=5, text_vocab_size=7)

    whole = train("whole", fresh())
    stopped, read = fresh(), fresh().batch

    def read_until_the_ninth(places: np.ndarray) -> TokenBatch:
        if places[0] == 8 * 4:
            raise ConnectionError("the network is gone")
        return read(places)

    monkeypatch.setattr(stopped, "batch", read_until_the_ninth)
    with pytest.raises(ConnectionError):
        train("stopped", stopped)
    assert list((tmp_path / "stopped" / "checkpoints").iterdir())
    resumed = train("stopped", fresh())
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_places_are_steps_in_order(hub: Path):
    stream = TokenStream.open(str(hub))
    assert [rows.tolist() for rows in itertools.islice(step_rows(stream, 3, 0, 4), 2)] == [[12, 13, 14], [15, 16, 17]]
    assert sorted(next(iter(step_rows(arrays(5), 5, 0, 0))).tolist()) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="place -1 of a stream"):
        stream.batch(np.array([-1]))


def test_long_captions_are_cut_and_counted(hub: Path):
    stream = TokenStream.open(str(hub), max_text_length=2)
    with pytest.warns(UserWarning, match=r"[12] of the 2 captions just read are cut to 2 tokens") as found:
        batch = stream.batch(np.arange(2 * NUM))
    assert len(found) == 1  # not one for every block
    lengths = np.minimum(batch.image_tokens[:, 0] % 4, 2)
    assert batch.text_lengths.tolist() == lengths.tolist() and batch.text_tokens.shape[1] == 2


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("image_tokens", [1, 2, 3], r"train-00001-of-00003\.parquet, row 11: image_tokens has 3 tokens, expected 5"),
        ("image_tokens", [1, 2, 999, 3, 4], r"00001-of-00003\.parquet, row 11: image_tokens has the value 999, exp"),
        ("image_tokens", [1, 2, -4, 3, 4], r"00001-of-00003\.parquet, row 11: image_tokens has the value -4"),
        ("image_tokens", None, r"00001-of-00003\.parquet, row 11: image_tokens is null"),
        ("text_tokens", [1, 7], r"00001-of-00003\.parquet, row 11: text_tokens has the value 7, expected 0 to 6"),
        ("text_tokens", [2**33], r"row 11: text_tokens has the value 8589934592, expected 0 to 6"),
    ],
)
def test_a_bad_row_is_named(tmp_path, monkeypatch, name: str, value, message: str):
    def spoil(file: int, rows: dict) -> None:
        if file == 1:
            rows[name][11] = value

    monkeypatch.setattr(streams, "BLOCK_ROWS", 8)
    folder = write_set(tmp_path / "set", spoil)
    stream = TokenStream.open(str(folder), image_length=5, image_vocab_size=200, text_vocab_size=7)
    for _ in range(2):  # the same again, not something stranger
        with pytest.raises(InputError, match=message):
            stream.batch(np.arange(NUM))


def test_files_that_are_none_or_cut_short(hub: Path, tmp_path):
    path = hub / "data" / "train-00001-of-00003.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:-300])
    with pytest.raises(InputError, match=r"train-00001-of-00003\.parquet is not a whole parquet file"):
        TokenStream.open(str(hub))
    path.write_bytes(whole)
    pq.write_table(pa.table({"image": [b"x"], "text": ["y"]}), path)
    with pytest.raises(InputError, match=r"train-00001.*no column image_tokens or text_tokens; it has image, text"):
        TokenStream.open(str(hub))
    with pytest.raises(InputError, match=r"nothing cannot be read: .*Look for the name on the hub"):
        TokenStream.open(str(tmp_path / "nothing"))


def test_a_page_that_is_damaged_names_its_file(hub: Path):
    path = hub / "data" / "train-00001-of-00003.parquet"
    content = bytearray(path.read_bytes())
    content[4:400] = bytes(396)  # behind the magic number: the first pages
    path.write_bytes(content)
    stream = TokenStream.open(str(hub))
    with pytest.raises(InputError, match=r"train-00001-of-00003\.parquet cannot be read"):
        stream.batch(np.arange(NUM))


def test_without_the_library_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'smalti\[data\]'"):
        TokenStream.open("owner/name")
