"""Progress: what the lines say, where they go, and that every stage of a long command says something."""

import io
import sys
import threading

import pytest

from smalti import progress as module
from smalti.progress import Stage, duration, stage, track


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.4, "59 s"), (59.6, "1 min"), (104, "1 min 44 s"), (3599.7, "1 h 0 min"), (7530, "2 h 5 min")],
)
def test_durations_are_told_in_words(seconds, text):
    assert duration(seconds) == text


def test_a_line_tells_step_share_rate_loss_and_time_left():
    clock = Clock()
    made = Stage("image tokenizer", 1500, completed=40, clock=clock)
    assert made.beginning() == "image tokenizer: 1,500 steps, 40 done before"
    assert made.line() == "image tokenizer: step 40 of 1,500 (3 %)"
    clock.now += 1000
    made.update(40)
    made.update(41)
    assert made.line() == "image tokenizer: step 41 of 1,500 (3 %), 0.001 steps/s, 405 h 16 min left"
    clock.now += 299 / 12
    made.update(340, "loss 0.412")
    assert made.line() == "image tokenizer: step 340 of 1,500 (23 %), 12 steps/s, loss 0.412, 1 min 37 s left"
    assert made.state() == "340/1,500 steps · 12 steps/s · loss 0.412 · 1 min 37 s left"
    made.advance(1160)
    clock.now += 5
    assert made.ending() == "image tokenizer: done, 1,460 steps in 17 min 10 s, loss 0.412"


def test_rates_far_from_one_keep_three_figures():
    clock = Clock()
    made = Stage("slow", 100, clock=clock)
    clock.now += 400
    made.update(1)
    assert made.line() == "slow: step 1 of 100 (1 %), 0.0025 steps/s, 11 h 0 min left"
    fast = Stage("fast", unit="line", clock=clock)
    clock.now += 1
    fast.update(1_234_567)
    assert fast.line() == "fast: 1,234,567 lines, 1,234,567 lines/s"


def test_a_stage_without_a_unit_is_told_in_percent_and_without_a_total_by_time():
    clock = Clock()
    shares, unknown = Stage("measuring", 1, unit="", clock=clock), Stage("learning words", clock=clock)
    assert shares.beginning() == "measuring …" and unknown.beginning() == "learning words …"
    clock.now += 61
    assert shares.line() == "measuring: 1 min 1 s so far" and unknown.line() == "learning words: 1 min 1 s so far"
    shares.update(0.25)
    assert shares.line() == "measuring: 25 %, 3 min 3 s left"
    assert shares.ending() == "measuring: done, 1 min 1 s"


def test_without_a_terminal_lines_go_to_stderr_and_tell_of_a_step_that_never_ends(monkeypatch, capsys):
    monkeypatch.setattr(module, "LINE_EVERY_S", 0.001)
    told = threading.Event()
    plain = module._print
    monkeypatch.setattr(module, "_print", lambda line: plain(line) or (told.set() if "step 2 of 3" in line else None))
    with stage("training", 3) as made:
        made.update(2, "loss 1")
        assert told.wait(30)  # said by no update, since there is none
        made.say("a word between")
        made.update(3)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and lines[0] == "training: 3 steps" and lines[-1].startswith("training: done, 3 steps in ")
    assert "a word between" in lines
    assert threading.active_count() == 1 or not any(t.name == "progress" for t in threading.enumerate())


def test_with_the_usual_interval_a_quick_stage_is_two_lines_and_a_failed_one_has_no_end(capsys):
    assert list(track([3, 1, 2], "things", unit="thing", show=True)) == [3, 1, 2]
    assert [line.split(" in ")[0] for line in capsys.readouterr().err.splitlines()] == [
        "things: 3 things",
        "things: done, 3 things",
    ]
    with pytest.raises(KeyError), stage("failing", 3):
        raise KeyError
    assert capsys.readouterr().err == "failing: 3 steps\n"


def test_nothing_is_shown_where_nothing_is_asked_for(capsys):
    with stage("training", 3, show=False, watch=lambda _: "never said") as made:
        made.update(2, "loss 1")
        made.say("nothing")
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with stage("training [x]", 4, completed=1) as made:
        made.update(3, "loss 1")
        made.say("a word between")
    shown = terminal.getvalue()
    assert "training [x]" in shown and "━" in shown and "3/4 steps" in shown and "loss 1" in shown
    assert "a word between" in shown and "training [x]: 4 steps" not in shown
