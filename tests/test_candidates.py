"""Best of n against n: the exact average over all choices of n, the command, its files."""

import itertools
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_train_captions import CAPTIONS, encoded_pictures
from tiny_parti import GRID, tiny

from smalti.cli.app import run
from smalti.evaluate.candidates import CandidatesConfig, CandidatesReport, accuracy_by_n, any_by_n


def test_accuracy_is_the_average_over_all_choices_of_n():
    generator = np.random.default_rng(0)
    merit, right = generator.integers(4, size=(3, 6)).astype(float), generator.random((3, 6)) < 0.4
    found, ceiling = accuracy_by_n(merit, right), any_by_n(right)
    for row, n in itertools.product(range(3), range(1, 7)):
        best, any_right = [], []
        for chosen in itertools.combinations(range(6), n):
            tops = [i for i in chosen if merit[row, i] == max(merit[row, list(chosen)])]
            best.append(np.mean(right[row, tops]))
            any_right.append(right[row, list(chosen)].any())
        assert found[row, n - 1] == pytest.approx(np.mean(best))
        assert ceiling[row, n - 1] == pytest.approx(np.mean(any_right))
    assert np.allclose(found[:, 0], right.mean(1)) and np.allclose(ceiling[:, 0], right.mean(1))


def test_a_ranker_that_knows_is_the_ceiling_and_one_that_does_not_gains_nothing():
    right = np.random.default_rng(1).random((40, 8)) < 0.3
    merits = {"knows": right.astype(float), "blind": np.zeros((40, 8))}
    report = CandidatesReport.of(
        merits, right, bundle="b", weights_sha256="0", judged="so", config=CandidatesConfig(num_candidates=8)
    )
    assert report.accuracy["knows"] == report.accuracy["any"]
    assert report.accuracy["blind"] == pytest.approx([right.mean()] * 8)
    assert report.shown == [1, 2, 4, 8] and "| any |" in report.markdown()


def test_the_command_writes_table_and_plot(tmp_path, capsys):
    tiny().save(tmp_path / "bundle")
    table = pa.table({"image": encoded_pictures((8 * GRID[0], 8 * GRID[1])), "caption": [c[:9] for c in CAPTIONS]})
    pq.write_table(table, tmp_path / "pairs.parquet")
    command = ["evaluate", "candidates", str(tmp_path / "bundle"), "--pairs", str(tmp_path / "pairs.parquet")]
    command += ["-n", "3", "--num", "2", "-o", str(tmp_path / "report"), "--quiet", "--guidance-scale", "2"]
    assert run(command) == 0
    shown = capsys.readouterr().out
    assert "pmi" in shown and "picture" in shown and "any" in shown and "best of 3" in shown
    content = json.loads((tmp_path / "report" / "candidates.json").read_text())
    assert set(content["accuracy"]) == {"pmi", "picture", "any"} and content["num_prompts"] == 2
    assert (tmp_path / "report" / "candidates.png").stat().st_size > 5000
    assert "--guidance-scale 2" in (tmp_path / "report" / "candidates.md").read_text()
    assert run(command) == 2 and "exists" in capsys.readouterr().err
    with pytest.raises(ValueError, match="num_candidates is 0"):
        CandidatesConfig(num_candidates=0)
