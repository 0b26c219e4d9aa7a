"""The judge of coloured digits: the classifier, what a picture shows, what a caption says."""

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from smalti.data.digit_sources import read_mnist, scikit_learn_digits
from smalti.data.digits import ColouringConfig, SourceDigits, colour_digits, source_of, write_digits
from smalti.errors import InputError
from smalti.evaluate import digits as judge
from smalti.evaluate.digits import (
    SHIPPED_CLASSIFIER,
    ClassifierConfig,
    DigitClassifier,
    Judgement,
    binomial_rate,
    caption_accuracy,
    classify_digits,
    judge_pictures,
    load_digit_classifier,
    prompt_accuracy,
    save_digit_classifier,
    shift_masks,
    shipped_classifier,
    train_digit_classifier,
)
from smalti.evaluate.report import read_held_out


@pytest.fixture(scope="module")
def splits() -> dict[str, SourceDigits]:
    return scikit_learn_digits()


@pytest.fixture(scope="module")
def classifier(splits: dict[str, SourceDigits]) -> DigitClassifier:
    config = ClassifierConfig(num_steps=61, batch_size=64)
    return train_digit_classifier(splits["train"], config, show_progress=False)


class FixedClassifier(DigitClassifier):
    """Reads the digit from the mask's ink, so that a test can say what will be read: n pixels mean n."""

    def forward(self, masks: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(masks.sum(dim=(1, 2)).long() % 10, 10).float()


def draw(num_ink: int, foreground: tuple[int, ...], background: tuple[int, ...]) -> np.ndarray:
    picture = np.empty((28, 28, 3), np.uint8)
    picture[:] = background
    picture[9, 5 : 5 + num_ink] = foreground
    return picture


# ---- the classifier ----


def test_a_few_steps_learn_real_digits(classifier: DigitClassifier, splits: dict[str, SourceDigits]) -> None:
    test = splits["test"]
    assert binomial_rate(classify_digits(classifier, test.masks) == test.labels)["rate"] > 0.85


def test_training_is_decided_by_its_seed(splits: dict[str, SourceDigits]) -> None:
    def train(seed: int) -> dict[str, torch.Tensor]:
        config = ClassifierConfig(seed=seed, num_steps=3, batch_size=7)
        return train_digit_classifier(splits["train"], config, show_progress=False).state_dict()

    before = torch.get_rng_state()
    first, again, other = train(5), train(5), train(6)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["layers.0.weight"], other["layers.0.weight"])


def test_a_saved_classifier_reads_the_same(
    classifier: DigitClassifier, splits: dict[str, SourceDigits], tmp_path: Path
) -> None:
    save_digit_classifier(classifier, tmp_path / "c.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["c.safetensors"]
    loaded = load_digit_classifier(tmp_path / "c.safetensors")
    masks = splits["validation"].masks
    assert not loaded.training
    assert (classify_digits(loaded, masks) == classify_digits(classifier, masks)).mean() > 0.98  # half precision


def test_a_file_that_is_no_classifier_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match=r"bad.safetensors is not a saved digit classifier .*train one with"):
        load_digit_classifier(tmp_path / "bad.safetensors")
    with pytest.raises(InputError, match=r"absent.safetensors is not a saved digit classifier"):
        load_digit_classifier(tmp_path / "absent.safetensors")


@pytest.mark.parametrize(
    ("change", "message"), [({"num_steps": 0}, "must be positive"), ({"max_shift": 28}, r"28 is outside 0 \.\. 27")]
)
def test_classifier_config_is_checked(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassifierConfig(**change)


def test_shifts_against_a_loop() -> None:
    masks = torch.rand(5, 28, 28, generator=torch.Generator().manual_seed(1)) < 0.4
    shifts = torch.tensor([[0, 0], [2, -1], [-3, 5], [27, 0], [0, -27]])
    expected = torch.zeros_like(masks)
    for n, (down, right) in enumerate(shifts.tolist()):
        for y in range(28):
            for x in range(28):
                if 0 <= y + down < 28 and 0 <= x + right < 28:
                    expected[n, y + down, x + right] = masks[n, y, x]
    assert torch.equal(shift_masks(masks, shifts), expected)


# ---- the shipped classifier ----


@pytest.mark.parametrize(
    ("source", "num", "at_least", "argument"), [("mnist", 5000, 0.985, "--mnist DIR "), ("scikit-learn", 300, 0.97, "")]
)
def test_a_shipped_classifier_is_small_and_says_how_good_it_is(
    source: str, num: int, at_least: float, argument: str
) -> None:
    path = shipped_classifier(source)
    report = json.loads(path.with_suffix(".json").read_text())
    assert path.stat().st_size < 300_000
    assert all(t.dtype == torch.float16 for t in load_file(path).values() if t.is_floating_point())
    assert report["source"] == source and report["test_accuracy"]["num"] == num
    assert report["test_accuracy"]["rate"] >= at_least
    assert report["command"].startswith(f"python -m smalti.evaluate.digits {argument}--seed")


def test_digits_are_read_by_the_classifier_of_their_source(splits: dict[str, SourceDigits], tmp_path: Path) -> None:
    write_digits(tmp_path, "scikit-learn", {"test": splits["test"]}, show_progress=False)
    held_out = read_held_out(tmp_path)
    assert held_out.digits == source_of(tmp_path / "test.parquet") == "scikit-learn"
    path = shipped_classifier(held_out.digits)
    judgement = judge_pictures(held_out.pictures, held_out.captions, load_digit_classifier(path))
    said = json.loads(path.with_suffix(".json").read_text())["test_accuracy"]["rate"]
    assert prompt_accuracy(judgement)["all"]["rate"] == pytest.approx(said, abs=1 / 300)


@pytest.mark.parametrize("content", [None, b"no table", b""])
def test_the_source_of_a_table_that_does_not_say_is_none(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "test.parquet"
    if content is None:
        pq.write_table(pa.table({"caption": ["a"]}), path)
    else:
        path.write_bytes(content)
    assert source_of(path) is None
    assert shipped_classifier(source_of(path)) == shipped_classifier("pickle") == SHIPPED_CLASSIFIER


def test_the_shipped_classifier_is_as_good_as_it_says(shared_dir: Path) -> None:
    test = read_mnist(shared_dir / "data" / "mnist")["test"]
    report = json.loads(SHIPPED_CLASSIFIER.with_suffix(".json").read_text())
    rate = binomial_rate(classify_digits(load_digit_classifier(), test.masks) == test.labels)["rate"]
    assert rate == pytest.approx(report["test_accuracy"]["rate"], abs=2 / 5000)


def test_true_pictures_are_judged_right(shared_dir: Path) -> None:
    test = read_mnist(shared_dir / "data" / "mnist")["test"]
    few = SourceDigits(test.masks[:500], test.labels[:500])
    coloured = colour_digits(few, "test", ColouringConfig())
    accuracy = prompt_accuracy(judge_pictures(coloured.pictures, coloured.captions, load_digit_classifier()))
    assert accuracy["foreground"]["rate"] == accuracy["background"]["rate"] == 1.0
    assert accuracy["all"]["rate"] == accuracy["digit"]["rate"] > 0.98


# ---- judging ----


def test_each_part_of_a_caption_is_judged_by_itself() -> None:
    red, cyan, white = (3, 0, 0), (0, 3, 3), (3, 3, 3)
    pictures = np.stack(
        [
            draw(4, red, cyan),
            draw(5, red, cyan),  # another digit
            draw(4, white, cyan),  # another foreground
            draw(4, red, white),  # another background
            draw(4, cyan, red),  # the colours swapped
            draw(0, red, cyan),  # no digit
            draw(10, red, red),  # only the foreground's colour
        ]
    )
    judgement = judge_pictures(pictures, ["normal red four on bright cyan"] * 7, FixedClassifier())
    assert judgement.digits.tolist() == [4, 5, 4, 4, 4, 0, 0]
    assert judgement.digit_ok.tolist() == [True, False, True, True, True, False, False]
    assert judgement.foreground_ok.tolist() == [True, True, False, True, False, False, False]
    assert judgement.background_ok.tolist() == [True, True, True, False, False, True, False]
    assert judgement.all_ok.tolist() == [True] + [False] * 6
    accuracy = prompt_accuracy(judgement)
    assert {name: rate["rate"] * 7 for name, rate in accuracy.items()} == pytest.approx(
        {"all": 1, "digit": 4, "foreground": 3, "background": 4}
    )


def test_an_empty_mask_is_not_a_zero() -> None:
    picture = draw(0, (0, 0, 0), (0, 3, 3))[None]
    judgement = judge_pictures(picture, ["normal red zero on bright cyan"], FixedClassifier())
    assert judgement.digits.tolist() == [0] and not judgement.digit_ok[0]


def test_captions_and_pictures_must_match_in_number() -> None:
    with pytest.raises(InputError, match="2 pictures but 1 captions"):
        judge_pictures(np.zeros((2, 28, 28, 3), np.uint8), ["normal red one on bright cyan"], FixedClassifier())
    with pytest.raises(InputError, match="1 predicted captions but 2 true ones"):
        caption_accuracy(["a"], ["a", "b"])


def test_caption_accuracy_by_slot() -> None:
    truth = ["dark green eight on bright cyan"] * 5
    predicted = [
        "dark green eigth on bright cyan",
        "dark green seven on bright cyan",
        "light green eight on bright cyan",
        "dark green eight on bright red",
        "dark green eight",
    ]
    accuracy = caption_accuracy(predicted, truth)
    assert {name: rate["rate"] for name, rate in accuracy.items()} == pytest.approx(
        {"all": 0.2, "digit": 0.6, "foreground": 0.6, "background": 0.6}
    )


def test_a_rate_worked_by_hand() -> None:
    rate = binomial_rate(np.array([True] * 3 + [False]))
    assert rate == {"rate": 0.75, "standard_error": pytest.approx(math.sqrt(3 / 64)), "num": 4}
    with pytest.raises(ValueError, match="at least one trial"):
        binomial_rate(np.zeros(0, dtype=bool))


def test_the_standard_error_is_the_spread_of_repeated_trials() -> None:
    trials = np.random.default_rng(0).random((2000, 101)) < 0.3
    rates = [binomial_rate(row)["rate"] for row in trials]
    expected = binomial_rate(trials.ravel())["standard_error"] * math.sqrt(2000)
    assert np.std(rates) == pytest.approx(expected, rel=0.05)


def test_prompt_accuracy_counts_pictures_right_in_all_parts() -> None:
    ok = np.array([True, True, False, False])
    judgement = Judgement(np.zeros(4, np.int64), ok, ok[[0, 2, 1, 3]], np.array([True, False, True, True]))
    assert {name: rate["rate"] for name, rate in prompt_accuracy(judgement).items()} == {
        "all": 0.25,
        "digit": 0.5,
        "foreground": 0.5,
        "background": 0.75,
    }


# ---- the command ----


def test_the_command_trains_saves_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "c.safetensors"
    judge.main(["--output", str(output), "--num-steps", "2", "--seed", "3"])
    printed = capsys.readouterr().out
    report = json.loads(output.with_suffix(".json").read_text())
    assert json.loads(printed[printed.index("{") :]) == report
    assert report["command"] == "python -m smalti.evaluate.digits --seed 3 --num-steps 2"
    assert (report["source"], report["num_train"], report["test_accuracy"]["num"]) == ("scikit-learn", 1297, 300)
    load_digit_classifier(output)
    with pytest.raises(SystemExit, match="2"):
        judge.main(["--output", str(output)])
    assert "exists; add --force" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        judge.main(["--output", str(output), "--force", "--mnist", str(tmp_path)])
    assert "holds no train-images-idx3-ubyte" in capsys.readouterr().err
