"""Models of lines: exact likelihoods, completions that keep what was given, and runs that go on where they stopped."""

import csv
import itertools
import json
import math
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_bundle import save_tiny_bundle
from tiny_lines import LENGTH, VOCAB_SIZE, random_codes, tiny_line_model, write_text

from smalti.cli.app import run
from smalti.errors import InputError
from smalti.models.decoder_only import new_model
from smalti.recipes.line_presets import LINE_PRESETS, choose_preset, line_layout
from smalti.tasks import line_files
from smalti.tasks.images import Pipeline
from smalti.tasks.line_files import complete_file, score_file
from smalti.tasks.lines import STRATEGIES, CompleteConfig, LineModel


@pytest.fixture(scope="module")
def model():
    return tiny_line_model()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "tiny"
    model.save(folder)
    return folder


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(line_files, "LINES_PER_PIECE", 4)


def nats_one_by_one(model, codes):
    """−ln p of each code from the whole softmax over codes, a forward pass for every prefix."""
    offset = model.layout.vocabulary["image"].offset
    ids, found = [0], []
    for code in codes:
        with torch.no_grad():
            logits = model.model.logits(model.model.hidden(torch.tensor([ids]))[0, -1])[offset:]
        found.append(float(logits.double().logsumexp(0) - logits[code].double()))
        ids.append(offset + int(code))
    return found


# Likelihood


def test_scores_are_those_of_one_prefix_after_the_other(model):
    codes, lengths = random_codes(5), [7, 0, 3, 7, 1]
    found = model.score(torch.tensor(codes), torch.tensor(lengths), batch_size=2)
    for row, length in enumerate(lengths):
        expected = nats_one_by_one(model, codes[row, :length]) + [0.0] * (LENGTH - length)
        np.testing.assert_allclose(found[row], expected, atol=1e-5)


def test_probabilities_of_all_lines_sum_to_one():
    model = tiny_line_model(length=3, vocab_size=5)
    every = torch.tensor(list(itertools.product(range(5), repeat=3)))
    nats = model.score(every, torch.full((125,), 3)).sum(1)
    assert float((-nats).exp().sum()) == pytest.approx(1, abs=1e-5)


def test_the_batch_changes_nothing_beyond_rounding(model):
    codes, lengths = torch.tensor(random_codes(23)), torch.arange(23) % (LENGTH + 1)
    whole = model.score(codes, lengths, batch_size=23)
    torch.testing.assert_close(model.score(codes, lengths, batch_size=3), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("codes", "lengths", "message"),
    [
        ([[1, 2, 11]], [3], r"line 0, code 2 is 11; expected 0..10"),
        ([[1] * 8], [8], r"lines of this model have up to 7 codes"),
    ],
)
def test_lines_that_do_not_fit_are_explained(model, codes, lengths, message):
    with pytest.raises(ValueError, match=message):
        model.score(torch.tensor(codes), torch.tensor(lengths))


# Completing


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_completions_keep_the_prefix_and_know_their_own_likelihood(model, strategy):
    codes = random_codes(9)
    prefixes = [torch.tensor(codes[row, : row % (LENGTH + 1)]) for row in range(9)]
    config = CompleteConfig(strategy=strategy, num_candidates=3, beam_width=3, seed=5)
    found = model.complete(prefixes, config, batch_size=4)
    nats = model.score(found.codes, torch.full((9,), LENGTH))
    for row, prefix in enumerate(prefixes):
        assert found.codes[row, : len(prefix)].tolist() == prefix.tolist()
        assert float(found.log_probs[row]) == pytest.approx(-float(nats[row, len(prefix) :].sum()), abs=1e-4)
    assert found.codes.min() >= 0 and found.codes.max() < VOCAB_SIZE


def test_a_beam_as_wide_as_the_choice_finds_the_likeliest_line():
    model = tiny_line_model(length=3, vocab_size=5)
    every = torch.tensor(list(itertools.product(range(5), repeat=3)))
    nats = model.score(every, torch.full((125,), 3)).sum(1)
    found = model.complete([torch.zeros(0, dtype=torch.long)], CompleteConfig(strategy="beam", beam_width=25))
    assert found.codes[0].tolist() == every[nats.argmin()].tolist()
    assert float(found.log_probs[0]) == pytest.approx(-float(nats.min()), abs=1e-5)


def test_best_of_n_is_the_likeliest_of_the_lines_with_its_seeds(model):
    prefix = torch.tensor([3, 1])
    best = model.complete([prefix] * 2, CompleteConfig(strategy="best-of-n", num_candidates=4, seed=8))
    for row in range(2):
        drawn = [model.complete([prefix], CompleteConfig(seed=8 + 4 * row + i)) for i in range(4)]
        likeliest = max(drawn, key=lambda found: float(found.log_probs[0]))
        assert best.codes[row].tolist() == likeliest.codes[0].tolist()


def test_a_line_draws_the_same_wherever_it_stands_in_the_work(model):
    prefixes = [torch.tensor([row]) for row in range(6)]
    whole = model.complete(prefixes, CompleteConfig(seed=2)).codes
    later = model.complete(prefixes[4:], CompleteConfig(seed=2), first_line=4, batch_size=1).codes
    assert later.tolist() == whole[4:].tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "best"}, "strategy 'best' is unknown; choose one of sample, greedy, beam, best-of-n"),
        ({"num_candidates": 0}, "num_candidates is 0; it must be 1 to 1024"),
        ({"temperature": 0}, 'give strategy "greedy"'),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_settings_that_cannot_be_are_explained(settings, message):
    with pytest.raises(ValueError, match=message):
        CompleteConfig(**settings)


# Bundles


def test_a_bundle_comes_back_as_it_was(model, saved, capsys):
    loaded = LineModel.load(saved)
    assert (loaded.weights_sha256, loaded.bundle.figures, loaded.length, loaded.vocab_size) == (
        model.weights_sha256,
        model.bundle.figures,
        LENGTH,
        VOCAB_SIZE,
    )
    assert sorted(path.name for path in saved.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert loaded.bundle.is_lines and not loaded.bundle.can_draw and not loaded.bundle.can_caption
    assert run(["info", str(saved)]) == 0
    shown = capsys.readouterr().out
    assert "7 codes in 0..10" in shown and "2.5 ± 0.1" in shown and model.weights_sha256[:40] in shown


def test_bundles_of_another_kind_are_told_apart(saved, tmp_path):
    pictures = save_tiny_bundle(tmp_path / "pictures")
    with pytest.raises(InputError, match="is a bundle of pictures, not of lines"):
        LineModel.load(pictures)
    with pytest.raises(InputError, match="is a bundle of lines, not of pictures with captions"):
        Pipeline.load(saved)


def test_presets_have_the_parameters_they_are_named_for():
    layout = line_layout(67, 1025)
    for name, preset in LINE_PRESETS.items():
        shape = preset.transformer(layout, dropout=0.1)
        with torch.device("meta"):
            num_parameters = new_model(layout, shape).num_parameters
        assert num_parameters == pytest.approx(float(name[:-1]) * 1e6, rel=0.07)
        assert preset.tokens_from == 0 or preset.tokens_from == pytest.approx(4 * num_parameters, rel=0.07)
    assert [choose_preset("auto", n) for n in (0, 11_999_999, 12_000_000, 67 * 10**6, 10**10)] == [
        "1M",
        "1M",
        "3M",
        "10M",
        "100M",
    ]
    assert choose_preset("30M", 5) == "30M"
    with pytest.raises(ValueError, match="preset '2M' is unknown; choose one of auto, 1M"):
        choose_preset("2M", 5)


# Files of lines


def read_csv(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_file_is_scored_line_by_line_and_place_by_place(model, tmp_path, small_pieces):
    codes, lengths = random_codes(10), np.array([7, 3, 0, 7, 7, 5, 7, 1, 7, 7])
    found = score_file(model, write_text(tmp_path / "lines.txt", codes, lengths), tmp_path / "scores", batch_size=3)
    nll = model.score(torch.tensor(codes), torch.tensor(lengths)).numpy()
    rows = read_csv(tmp_path / "scores" / "lines.csv")
    assert [row["tag"] for row in rows] == [f"picture-{row}.png" for row in range(10)]
    assert [float(row["nats"]) for row in rows] == pytest.approx(nll.sum(1).tolist(), abs=1e-5)
    assert rows[2]["nats_per_token"] == ""
    mean = nll.sum() / lengths.sum()
    residual = nll.sum(1) - mean * lengths
    error = math.sqrt((residual**2).sum() * 10 / 9) / lengths.sum()
    assert (found.num_lines, found.num_tokens) == (10, int(lengths.sum()))
    assert found.nats_per_token == pytest.approx(mean, abs=1e-5)
    assert found.standard_error == pytest.approx(error, abs=1e-5)
    assert found.bits_per_token == pytest.approx(mean / math.log(2), abs=1e-5)
    assert found.perplexity == pytest.approx(math.exp(mean), abs=1e-4)
    summary = json.loads((tmp_path / "scores" / "summary.json").read_text())
    assert summary["nats_per_token"] == found.nats_per_token and summary["weights_sha256"] == model.weights_sha256
    for place, row in enumerate(read_csv(tmp_path / "scores" / "positions.csv")):
        here = nll[lengths > place, place]
        assert int(row["num_lines"]) == len(here)
        assert float(row["nats_per_token"]) == pytest.approx(here.mean(), abs=1e-5)
        assert float(row["standard_error"]) == pytest.approx(here.std(ddof=1) / math.sqrt(len(here)), abs=1e-5)
    assert (tmp_path / "scores" / "positions.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(path.name for path in (tmp_path / "scores").iterdir()) == sorted(line_files.SCORE_FILES)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_file_is_completed_in_its_order(model, tmp_path, small_pieces, strategy):
    codes, lengths = random_codes(10), np.arange(10) % (LENGTH + 1)
    source = write_text(tmp_path / "prefixes.txt", codes, lengths)
    config = CompleteConfig(strategy=strategy, num_candidates=2, beam_width=2, seed=3)
    assert complete_file(model, source, tmp_path / "done.txt", config) == 10
    expected = model.complete([torch.tensor(codes[row, :n]) for row, n in enumerate(lengths)], config)
    given = source.read_text().splitlines()
    for row, line in enumerate((tmp_path / "done.txt").read_text().splitlines()):
        assert (line + " ").startswith(given[row] + " ")
        assert line.split()[1:] == [str(code) for code in expected.codes[row].tolist()]
    side = read_csv(tmp_path / "done.txt.log_probs.csv")
    assert [float(row["log_prob"]) for row in side] == pytest.approx(expected.log_probs.tolist(), abs=1e-4)
    assert [(int(row["num_given"]), int(row["num_added"])) for row in side] == [(n, LENGTH - n) for n in lengths]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["done.txt", "done.txt.log_probs.csv", "prefixes.txt"]


def killed_in_piece(number, work) -> int:
    """Runs `work` in a process that is killed with SIGKILL before it writes a piece; returns how it ended."""
    pid = os.fork()
    if pid == 0:
        write = line_files._Parts.write

        def write_or_die(self, found, **arrays):
            if found == number:
                os.kill(os.getpid(), signal.SIGKILL)
            write(self, found, **arrays)

        line_files._Parts.write = write_or_die
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_killed_run_goes_on_and_ends_with_the_same_files(model, tmp_path, small_pieces, monkeypatch):
    codes, lengths = random_codes(14), np.arange(14) % (LENGTH + 1)
    source = write_text(tmp_path / "prefixes.txt", codes, lengths)
    complete_file(model, source, tmp_path / "whole.txt")
    score_file(model, source, tmp_path / "whole")
    assert killed_in_piece(2, lambda: complete_file(model, source, tmp_path / "killed.txt")) == -signal.SIGKILL
    assert killed_in_piece(1, lambda: score_file(model, source, tmp_path / "killed")) == -signal.SIGKILL
    assert not (tmp_path / "killed.txt").exists()
    done = []
    write = line_files._Parts.write
    monkeypatch.setattr(
        line_files._Parts, "write", lambda self, number, **arrays: done.append(number) or write(self, number, **arrays)
    )
    complete_file(model, source, tmp_path / "killed.txt")
    score_file(model, source, tmp_path / "killed")
    assert done == [2, 3, 1, 2, 3]
    for name in (".txt", ".txt.log_probs.csv", "/lines.csv", "/positions.csv", "/summary.json"):
        assert (tmp_path / f"killed{name}").read_bytes() == (tmp_path / f"whole{name}").read_bytes()
    assert not list(tmp_path.glob(".*part"))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_the_parts_of_another_job_are_refused(model, tmp_path, small_pieces):
    source = write_text(tmp_path / "prefixes.txt", random_codes(9), np.full(9, 2))
    assert killed_in_piece(1, lambda: complete_file(model, source, tmp_path / "out.txt")) == -signal.SIGKILL
    with pytest.raises(InputError, match=r"unfinished run with another settings: .* --force to start anew"):
        complete_file(model, source, tmp_path / "out.txt", CompleteConfig(seed=1))
    complete_file(model, source, tmp_path / "out.txt", CompleteConfig(seed=1), force=True)
    complete_file(model, source, tmp_path / "plain.txt", CompleteConfig(seed=1))
    assert (tmp_path / "out.txt").read_bytes() == (tmp_path / "plain.txt").read_bytes()
    with pytest.raises(InputError, match=r"out.txt exists already"):
        complete_file(model, source, tmp_path / "out.txt")


def test_the_commands(saved, tmp_path, capsys):
    source = write_text(tmp_path / "lines.txt", random_codes(6), [7, 2, 0, 7, 3, 5])
    out = tmp_path / "scores"
    assert run(["score", str(source), "--bundle", str(saved), "-o", str(out), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary == json.loads((out / "summary.json").read_text())
    done = tmp_path / "done.txt"
    arguments = ["complete", str(source), "--bundle", str(saved), "-o", str(done), "--strategy", "beam"]
    assert run([*arguments, "--beam-width", "2", "--batch-size", "3"]) == 0
    assert "6 lines" in capsys.readouterr().out
    expected = LineModel.load(saved).complete(
        [torch.tensor([], dtype=torch.long)], CompleteConfig(strategy="beam", beam_width=2)
    )
    assert done.read_text().splitlines()[2].split()[1:] == [str(code) for code in expected.codes[0].tolist()]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a.png 1 2 11\n", "line 1, column 11: the code 11 is out of range, expected 0 to 10"),
        ("a.png 1 -1\n", "line 1, column 9: the code -1 is out of range, expected 0 to 10. Mend the line, or set bad"),
        ("a.png 1\nb.png 1 x\n", "line 2, column 9: the word 'x' among the codes"),
        ("a.png 1\n\nb.png 1 1\n", "line 2, column 1: an empty line"),
        ("a.png 1 1 1 1 1 1 1 1\n", "8 codes after the tag, expected at most 7"),
        ("", "no "),
    ],
)
@pytest.mark.parametrize("command", ["score", "complete"])
def test_bad_lines_are_named(command, content, message, saved, tmp_path, capsys):
    source = tmp_path / "lines.txt"
    source.write_text(content)
    assert run([command, str(source), "--bundle", str(saved), "-o", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    source.write_text("a.png 1\n")  # what is mended is not mistaken for an unfinished run's other input
    assert run([command, str(source), "--bundle", str(saved), "-o", str(tmp_path / "out")]) == 0


def test_a_file_of_tags_has_prefixes_but_nothing_to_score(model, tmp_path):
    source = write_text(tmp_path / "tags.txt", random_codes(3), [0, 0, 0])
    with pytest.raises(InputError, match=r"tags\.txt has no codes to score"):
        score_file(model, source, tmp_path / "scores")
    assert complete_file(model, source, tmp_path / "done.txt") == 3


def test_one_line_has_no_standard_error(saved, tmp_path, capsys):
    source = write_text(tmp_path / "lines.txt", random_codes(1))
    assert run(["score", str(source), "--bundle", str(saved), "-o", str(tmp_path / "out")]) == 0
    assert re.match(r"\d\.\d{4} nats per token, .*: 1 lines, 7 tokens\n", capsys.readouterr().out)


def test_prefixes_are_not_written_over(model, tmp_path):
    source = write_text(tmp_path / "lines.txt", random_codes(2), [2, 1])
    with pytest.raises(InputError, match="holds the prefixes themselves"):
        complete_file(model, source, tmp_path / "." / "lines.txt", force=True)


def test_a_file_of_lines_is_no_caption(tmp_path, capsys):
    source, pictures = write_text(tmp_path / "lines.txt", random_codes(2)), tmp_path / "pictures"
    save_tiny_bundle(pictures)
    assert run(["complete", str(source), "--bundle", str(pictures), "-o", str(tmp_path / "out.txt")]) == 2
    assert "is a file, and" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("complete", "LINES"), "lines are completed from file to file"),
        (("complete", "missing.txt", "-o", "OUT"), "no such file: missing.txt"),
        (("complete", "LINES", "-o", "OUT", "--rows", "3"), "a bundle of lines, which has no use for --rows"),
        (("complete", "LINES", "-o", "OUT", "--strategy", "best"), "strategy 'best' is unknown"),
        (
            ("complete", "LINES", "-o", "OUT", "--strategy", "beam", "--top-k", "3"),
            "strategy beam has no use for --top-k",
        ),
        (
            ("complete", "LINES", "-o", "OUT", "--num-candidates", "3"),
            "strategy sample has no use for --num-candidates",
        ),
        (("complete", "LINES", "-o", "FOLDER"), "is a folder; completed lines go to a text file"),
        (("score", "LINES", "-o", "LINES"), "is a file; scores go to a folder"),
        (("score", "LINES", "a caption", "-o", "OUT"), "knows no captions"),
        (("score", "LINES"), "add -o FOLDER"),
        (("generate", "a caption", "-o", "OUT.png"), "is a bundle of lines, not of pictures"),
    ],
)
def test_mistakes_are_one_line(arguments, message, saved, tmp_path, capsys):
    source = write_text(tmp_path / "lines.txt", random_codes(2))
    places = {"LINES": source, "OUT": tmp_path / "out", "OUT.png": tmp_path / "out.png", "FOLDER": tmp_path}
    assert run([str(places.get(word, word)) for word in arguments] + ["--bundle", str(saved)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_temperature_reaches_the_draw(model):
    prefixes = [torch.tensor([row % VOCAB_SIZE]) for row in range(40)]
    cold, warm = (
        model.complete(prefixes, replace(CompleteConfig(), temperature=value)).log_probs.mean() for value in (0.3, 1.0)
    )
    assert cold > warm
