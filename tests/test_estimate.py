"""The estimate of a whole recipe: said from the pace of the first training stage, with reasons if it is long."""

import os

import pytest
import torch

from smalti.progress import Stage
from smalti.recipes import load_recipe, shipped_recipes
from smalti.training import estimate as module
from smalti.training.estimate import AFTER_STEPS, Estimate, Length, why_slow

MINUTES = {"image tokenizer": 1.0, "transformer": 2.0, "report": 0.5}


def said(estimate, name, *, first_s, pace_s, total=100, completed=0, why=lambda: []):
    """What is said on the way, by the number of steps made."""
    now = [0.0]
    stage = Stage(name, total, completed=completed, watch=estimate.watch(why), clock=lambda: now[0])
    lines = {}
    for step in range(completed, min(total, completed + 50)):
        stage.on_say = lambda line, step=step: lines.update({step + 1 - completed: line})
        now[0] += first_s if step == completed else pace_s
        stage.update(step + 1)
    return lines


def test_it_is_said_once_after_twenty_steps_without_the_first_and_with_the_later_stages():
    estimate = Estimate(MINUTES)
    lines = said(estimate, "image tokenizer", first_s=500.0, pace_s=0.9)
    text = "the whole will take about 5 min 15 s: image tokenizer 1 min 30 s, transformer 3 min, report 45 s"
    assert lines == {AFTER_STEPS: text}
    assert said(estimate, "transformer", first_s=1.0, pace_s=1.0) == {}


def test_a_later_stage_that_takes_far_longer_than_was_said_is_estimated_anew():
    """As a transformer does on a machine without a compiler, behind an image tokenizer that needs none."""
    lengths = {
        "image tokenizer": Length("image_tokenizer.train.num_steps", 100),
        "transformer": Length("num_epochs", 4),
    }
    estimate = Estimate(MINUTES, lengths)
    said(estimate, "image tokenizer", first_s=1.0, pace_s=0.6)  # and so 72 s for the transformer
    assert said(estimate, "transformer", first_s=1.0, pace_s=1.4) == {}
    lines = said(estimate, "transformer", first_s=1.0, pace_s=4.8, why=lambda: ["there is no kernel"])
    assert lines == {
        20: "what is left will take about 10 min: transformer 8 min, report 2 min. The recipe states 3 min 30 s. Why: "
        "there is no kernel. In the time that it states you can have a shorter training: num_epochs=1."
    }


def test_what_nothing_is_stated_of_is_estimated_alone():
    assert said(Estimate(), "transformer", first_s=1.0, pace_s=1.2) == {20: "transformer will take about 2 min"}
    assert said(Estimate(MINUTES), "other", first_s=1.0, pace_s=1.2) == {20: "other will take about 2 min"}


def test_a_stage_that_goes_on_takes_what_is_left_of_it():
    lines = said(Estimate(MINUTES), "transformer", first_s=1.0, pace_s=1.2, completed=50)
    assert lines == {20: "the whole will take about 1 min 30 s: transformer 1 min, report 30 s"}


def test_short_stages_are_not_estimated():
    assert said(Estimate(MINUTES), "transformer", first_s=1.0, pace_s=1.0, total=15) == {}


def test_reasons_and_what_to_set_come_only_beyond_twice_the_stated_time():
    lengths = {
        "image tokenizer": Length("image_tokenizer.train.num_steps", 100),
        "transformer": Length("num_epochs", 4.0),
    }
    asked = []

    def why():
        asked.append(1)
        return ["it is old: buy another", "it is busy"]

    within = said(Estimate(MINUTES, lengths), "image tokenizer", first_s=1.0, pace_s=1.2, why=why)
    assert "Why" not in within[20] and not asked
    beyond = said(Estimate(MINUTES, lengths), "image tokenizer", first_s=1.0, pace_s=2.4, why=why)
    assert beyond[20].endswith(
        ". The recipe states 3 min 30 s. Why: it is old: buy another; it is busy. In the time that it states you can "
        "have a shorter training: image_tokenizer.train.num_steps=25 num_epochs=1."
    )
    unknown = said(Estimate(MINUTES), "image tokenizer", first_s=1.0, pace_s=2.4)
    assert "Why: nothing that can be told from here" in unknown[20]


@pytest.fixture
def machine(monkeypatch):
    """A fast machine, until a test makes it slow."""
    monkeypatch.setattr(module, "multiplies_bfloat16", lambda device: True)
    monkeypatch.setattr(module.processor, "instruction_set", lambda: "avx2")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(os, "getloadavg", lambda: (2.1, 2.0, 2.0), raising=False)
    return monkeypatch


def test_every_reason_is_named_with_what_to_do_about_it(machine):
    assert why_slow("bfloat16", "cpu") == []
    assert why_slow("bfloat16", "cpu", no_kernel="no compiler") == ["there is no native training kernel (no compiler)"]
    machine.setattr(torch, "get_num_threads", lambda: 1)
    assert why_slow("bfloat16", "cpu") == ["one thread is used of 2 cores: give it two, OMP_NUM_THREADS=2"]
    machine.setattr(torch, "get_num_threads", lambda: 2)
    machine.setattr(os, "getloadavg", lambda: (6.4, 2.0, 2.0))
    assert why_slow("bfloat16", "cpu") == ["other programs want the processor too (6 at once on 2 cores): end them"]
    machine.delattr(os, "getloadavg")
    assert why_slow("bfloat16", "cpu") == []
    machine.setattr(module, "multiplies_bfloat16", lambda device: False)
    assert why_slow("bfloat16", "cpu") == [
        "this processor (avx2) emulates bfloat16: set precision=float32, in a new folder"
    ]
    assert why_slow("float32", "cpu") == [
        "this processor (avx2) does not multiply in bfloat16, in which recipes are timed"
    ]


def test_recipes_that_name_a_time_state_it_for_the_estimate_too():
    timed = {name for name in shipped_recipes() if "minutes" in load_recipe(name).expects}
    assert {"demo", "emoji", "emoji-vqgan", "titok"} <= timed
    assert timed == {name for name in shipped_recipes() if load_recipe(name).minutes}


def test_recipes_state_minutes_until_what_is_trained_changes():
    stated = load_recipe("demo").minutes
    assert set(stated) == {"image tokenizer", "transformer", "report"}
    for setting in ("output=elsewhere", "precision=float32", "train.seed=3", "evaluate.num_pairs=3"):
        assert load_recipe("demo", [setting]).minutes == stated
    for setting in ("num_epochs=9", "image_tokenizer.train.num_steps=9", "d_model=64", "colourings=3"):
        assert load_recipe("demo", [setting]).minutes == {}
    assert load_recipe("emoji", ["data.train=a.parquet", "image_tokenizer=b"]).minutes == load_recipe("emoji").minutes
    assert load_recipe("vqgan").minutes == {} and load_recipe("titok").minutes["image tokenizer"] > 30
