"""The bundle of classes that ships: small, its card complete, and digits that a classifier reads as what was asked."""

import numpy as np
import torch

from smalti.bundle import CARD, shipped_bundles
from smalti.cli.app import run
from smalti.evaluate.digits import classify_digits, load_digit_classifier
from smalti.image_files import read_picture, read_receipt
from smalti.tasks.classes import ClassPipeline


def test_it_is_small_and_says_where_it_comes_from():
    folder = shipped_bundles()["mnist-classes"]
    assert (folder / "model.safetensors").stat().st_size < 3e6
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 3.2e6
    card = (folder / CARD).read_text()
    for said in ("MNIST", "licence of the weights", "smalti train c2i", "class accuracy", "nats per code"):
        assert said in card


def test_another_network_reads_the_digits_that_were_asked_for():
    pipe = ClassPipeline.load("mnist-classes")
    labels = [label for label in range(10) for _ in range(4)]
    images = pipe.decode_images(pipe.generate_codes(labels, seed=list(range(40)), guidance_scale=1.5))
    read = classify_digits(load_digit_classifier(), (images.mean(1) > 0.5).numpy())
    assert np.mean(np.asarray(read) == labels) >= 0.95  # 99 % of a thousand; one of these may fail


def test_the_class_makes_its_own_codes_likelier():
    pipe = ClassPipeline.load("mnist-classes")
    codes = pipe.generate_codes(list(range(10)), seed=1, guidance_scale=1.5)
    own, other = (pipe.score_codes(codes, [(label + shift) % 10 for label in range(10)]) for shift in (0, 5))
    assert (own < other).sum() >= 9 and torch.isfinite(own).all()


def test_the_command_draws_it(tmp_path, capsys):
    assert run(["generate", "--class", "seven", "-o", str(tmp_path / "a.png")]) == 0
    assert "drawn by the bundle mnist-classes" in capsys.readouterr().err
    assert read_receipt(tmp_path / "a.png")["label"] == 7 and read_picture(tmp_path / "a.png").size == (224, 224)
    assert run(["replay", str(tmp_path / "a.png")]) == 0
