"""Pictures of a file of captions as a token table: the codes that are drawn one by one, whoever draws them."""

import pyarrow.parquet as pq
import pytest

from smalti.data.tokens import SCHEMA, TokenTable
from smalti.tasks import draw_table as module
from smalti.tasks.draw_table import DrawTableConfig, draw_table
from smalti.tasks.images import Pipeline

CAPTIONS = ["dark green eight on bright cyan", "light red one on dark blue", "dark green eight on bright cyan"] * 2
SMALL = DrawTableConfig(seed=7, rows_per_part=4)


def draw(output, config=SMALL, **sampling):
    return draw_table("digits", CAPTIONS, output, config, show_progress=False, **sampling)


def test_rows_are_what_is_drawn_one_by_one(tmp_path):
    assert draw(tmp_path / "drawn.parquet", guidance_scale=2.0) == len(CAPTIONS)
    pipe, table = Pipeline.load("digits"), pq.read_table(tmp_path / "drawn.parquet")
    assert table.schema.equals(SCHEMA) and table["__key__"].to_pylist() == [f"{row:09d}" for row in range(6)]
    assert table["text"].to_pylist() == CAPTIONS
    assert table["text_tokens"].to_pylist() == [pipe.text_tokenizer.encode(caption) for caption in CAPTIONS]
    for row, caption in enumerate(CAPTIONS):
        alone = pipe.generate_codes(caption, seed=7 + row, guidance_scale=2.0)
        assert table["image_tokens"][row].as_py() == alone.flatten().tolist()
    metadata = TokenTable.open(tmp_path / "drawn.parquet").metadata
    assert metadata["codebook_size"] == pipe.image_tokenizer.config.codebook_size


def test_a_run_that_was_stopped_keeps_its_parts(tmp_path, monkeypatch):
    whole, output = tmp_path / "whole.parquet", tmp_path / "drawn.parquet"
    draw(whole)

    def stopped(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "_rows", stopped)
        draw(output)
    parts = sorted((tmp_path / ".drawn.parquet.parts").glob("*.parquet"))
    assert len(parts) == 2 and not output.exists()
    with pytest.raises(ValueError, match="begun with other settings"):
        draw(output, DrawTableConfig(seed=8, rows_per_part=4))
    monkeypatch.setattr(module._Job, "do", stopped)  # nothing is left to draw
    draw(output)
    assert output.read_bytes() == whole.read_bytes() and not parts[0].exists()
    with pytest.raises(ValueError, match="exists"):
        draw(output)


def test_bad_input_is_named(tmp_path):
    with pytest.raises(ValueError, match="no captions"):
        draw_table("digits", [], tmp_path / "drawn.parquet")
    with pytest.raises(ValueError, match="workers is -1"):
        DrawTableConfig(workers=-1)
    with pytest.raises(ValueError, match="temperatur"):
        draw(tmp_path / "drawn.parquet", temperatur=1.0)
    assert not list(tmp_path.iterdir())
