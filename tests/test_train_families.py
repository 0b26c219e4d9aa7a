"""Training image tokenizers on real pictures: every family overfits, resumes exactly, and keeps both sides apart."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from smalti.cli import app as cli
from smalti.data.picture_sets import PicturesConfig, PictureSet
from smalti.errors import InputError
from smalti.evaluate.reconstruction import measure_reconstruction, to_images
from smalti.image_tokenizers import load_image_tokenizer, save_image_tokenizer
from smalti.image_tokenizers.losses import AdversarialConfig, LossConfig
from smalti.image_tokenizers.quantizer import FSQConfig, QuantizerConfig
from smalti.image_tokenizers.titok import TiTok, TiTokConfig
from smalti.image_tokenizers.titok import ViTConfig as TiTokViT
from smalti.image_tokenizers.vit_vqgan import ViTConfig, ViTVQGAN, ViTVQGANConfig
from smalti.image_tokenizers.vqgan import VQGAN, VQGANConfig
from smalti.image_tokenizers.vqvae import DeepulVQVAEConfig, VQVAEConfig
from smalti.recipes import TokenizerRecipe, load_recipe, shipped_recipes
from smalti.training import gan_tokenizer as module
from smalti.training.checkpoint import latest_checkpoint, load_checkpoint
from smalti.training.gan_tokenizer import (
    Adversary,
    TrainGANTokenizerConfig,
    last_weight,
    tokenizer_losses,
    train_gan_tokenizer,
)
from smalti.training.image_tokenizer import TrainTokenizerConfig, evaluate_reconstruction, train_tokenizer

SIZE = (16, 16)
CODES = QuantizerConfig(codebook_size=64, code_dim=8, update="gradient", l2_normalised=True)
VQGAN_CONFIG = VQGANConfig(
    quantizer=CODES, image_size=SIZE, channels=32, encoder_multipliers=(1, 2), decoder_multipliers=(1, 2),
    encoder_attention_levels=(), decoder_attention_levels=(), num_res_blocks=1, latent_channels=32,
)  # fmt: skip
VIT = ViTConfig(width=64, num_layers=2, num_heads=2, head_dim=32, mlp_width=256)
VIT_CONFIG = ViTVQGANConfig(encoder=VIT, decoder=VIT, quantizer=CODES, image_size=SIZE, patch_size=4)
TITOK_VIT = TiTokViT(width=64, num_layers=2, num_heads=2, patch_size=4, mlp_ratio=2.0)
TITOK_CONFIG = TiTokConfig(
    encoder=TITOK_VIT, decoder=TITOK_VIT, num_latents=5, quantizer=CODES, image_size=SIZE, target="pixels", proxy=None
)
PROXY_CONFIG = VQGANConfig(
    quantizer=QuantizerConfig(codebook_size=32, code_dim=32, update="gradient"), image_size=SIZE, channels=32,
    encoder_multipliers=(1, 1, 1), decoder_multipliers=(1, 1, 1), encoder_attention_levels=(),
    decoder_attention_levels=(), num_res_blocks=1, latent_channels=32, form="maskgit",
)  # fmt: skip
SHORT = TrainGANTokenizerConfig(
    num_steps=11, batch_size=3, learning_rate=1e-3, warmup_steps=2, ema_decay=0.5, precision="float32",
    evaluate_every=4, sample_every=0, checkpoint_every=3, log_every=2,
)  # fmt: skip
GAN = AdversarialConfig(
    weight=0.1, network="stylegan2", start=2, warmup_steps=2, ramp_steps=3, channels=4, adaptive=True, r1=1.0,
    r1_every=3, lecam=0.01, loss="non_saturating",
)  # fmt: skip
READING = PicturesConfig(workers=0)


def scenes(num, seed=0, rows=16, columns=16):
    """Bytes of smooth pictures with one hard-edged disc."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:rows, 0:columns] / rows
    pictures = np.empty((num, rows, columns, 3), np.uint8)
    for picture in pictures:
        base = random.uniform(30, 200, 3)
        slope = random.uniform(-40, 40, (2, 3))
        shaded = base + y[..., None] * slope[0] + x[..., None] * slope[1]
        cy, cx, radius = random.uniform(0.3, 0.7, 3)
        disc = (y - cy) ** 2 + (x - cx) ** 2 < (radius / 2) ** 2
        shaded[disc] = random.uniform(0, 255, 3)
        picture[:] = shaded.clip(0, 255)
    return pictures


def folder_of(path, pictures):
    path.mkdir(exist_ok=True)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(path / f"{i:02d}.png")
    return PictureSet(path)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("pictures"), scenes(21, rows=20, columns=24))


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("held_out"), scenes(5, seed=1))


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def state_of(directory):
    path = latest_checkpoint(directory)
    assert path is not None
    return load_checkpoint(path)


# Every family overfits eight pictures

OVERFIT = TrainGANTokenizerConfig(
    num_steps=200, batch_size=8, learning_rate=3e-3, warmup_steps=30, ema_decay=0.0, weight_decay=0.0,
    precision="float32", betas=(0.9, 0.95), final_share=0.0, evaluate_every=0, sample_every=0, checkpoint_every=0,
    log_every=100,
)  # fmt: skip
# Without k-means and restarts a ViT-VQGAN or TiTok of this size gives all patches one code: 13 dB at best.
LIVELY_CODES = QuantizerConfig(
    codebook_size=160, code_dim=32, ema_decay=0.8, kmeans_rounds=5, restart_below=0.1, l2_normalised=True
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_config", "steps"),
    [
        (VQGAN_CONFIG, 180),
        (replace(VQGAN_CONFIG, quantizer=FSQConfig(levels=(8, 5, 5))), 180),
        (replace(VIT_CONFIG, quantizer=LIVELY_CODES), 900),
        (replace(TITOK_CONFIG, quantizer=LIVELY_CODES), 900),
    ],
    ids=["vqgan", "vqgan-fsq", "vit_vqgan", "titok"],
)
def test_every_family_overfits_eight_pictures(tmp_path, model_config, steps):
    eight = folder_of(tmp_path / "eight", scenes(8))
    reading = PicturesConfig(min_crop=1.0, flip=False, workers=0)
    config = replace(OVERFIT, num_steps=steps)
    trained = train_gan_tokenizer(
        eight, eight, model_config, config, tmp_path / "run", losses=LossConfig(), adversarial=AdversarialConfig(),
        reading=reading, show_progress=False,
    )  # fmt: skip
    assert measure_reconstruction(trained, torch.from_numpy(scenes(8))).psnr_db >= 35


@pytest.mark.slow
@pytest.mark.parametrize(
    "model_config",
    [
        VQVAEConfig(
            image_size=16, levels=0, width=48, encoder_blocks=1, decoder_blocks=1, num_heads=2,
            quantizer=QuantizerConfig(codebook_size=128, code_dim=16, kmeans_rounds=5, ema_decay=0.8),
        ),
        DeepulVQVAEConfig(
            width=64, residual_width=32, image_size=16,
            quantizer=replace(LIVELY_CODES, code_dim=16, l2_normalised=False),
        ),
    ],
    ids=["vqvae", "deepul_vqvae"],
)  # fmt: skip
def test_the_small_families_overfit_eight_pictures(tmp_path, model_config):
    config = TrainTokenizerConfig(
        num_steps=600, batch_size=8, learning_rate=5e-3, ema_decay=0.0, precision="float32", evaluate_every=0,
        sample_every=0, checkpoint_every=0, log_every=0, weight_decay=0.0,
    )  # fmt: skip
    trained = train_tokenizer(scenes(8), scenes(8), model_config, config, tmp_path, show_progress=False)
    assert evaluate_reconstruction(trained, torch.from_numpy(scenes(8)), 255).psnr_db >= 35


# A run


def train(directory, pictures, held_out, config=SHORT, model=VQGAN_CONFIG, losses=None, adversarial=GAN):
    losses = losses or LossConfig(l1=0.5, logit_laplace=0.1, gradients=0.3)
    return train_gan_tokenizer(
        pictures, held_out, model, config, directory, losses=losses, adversarial=adversarial, reading=READING,
        show_progress=False,
    )  # fmt: skip


GAN_VQGAN = replace(VQGAN_CONFIG, dropout=0.1, quantizer=replace(CODES, update="ema", restart_below=0.1))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, pictures, held_out):
    """A run with everything on that was never interrupted."""
    directory = tmp_path_factory.mktemp("finished")
    train(directory, pictures, held_out, replace(SHORT, sample_every=8), GAN_VQGAN)
    return directory


def test_a_run_logs_every_part_and_writes_its_pictures(finished):
    training, evaluation = rows(finished / "training.csv"), rows(finished / "evaluation.csv")
    assert [int(row["step"]) for row in training] == [2, 4, 6, 8, 10]
    assert [int(row["step"]) for row in evaluation] == [0, 4, 8, 11]
    for row in training:
        step = int(row["step"])
        for name in ("loss", "l2", "l1", "logit_laplace", "gradients", "quantizer", "gradient_norm", "usage"):
            assert math.isfinite(float(row[name])), name
        assert row["perceptual"] == row["proxy_nats"] == ""
        assert (row["discriminator"] != "") == (step > GAN.start)
        assert (row["generator"] != "") == (step > GAN.start + GAN.warmup_steps)
    assert all(0 < float(row["codebook_usage"]) <= 1 and row["lpips"] == "" for row in evaluation)
    assert sorted(path.name for path in (finished / "reconstructions").iterdir()) == [
        f"step_{step:08d}.png" for step in (0, 8, 11)
    ]
    with Image.open(finished / "curves.png") as curves:
        assert curves.size == (1600, 350)
    assert list(finished.glob("events.out.tfevents.*"))


def test_the_image_tokenizer_of_a_run_is_its_best(finished, held_out):
    kept = load_image_tokenizer(finished / "image_tokenizer")
    report = measure_reconstruction(kept, held_out.fitted(range(5), SIZE))
    evaluation = rows(finished / "evaluation.csv")
    best = max(evaluation, key=lambda row: float(row["psnr_db"]))
    for name in ("psnr_db", "ssim", "frechet", "codebook_usage", "perplexity"):
        assert getattr(report, name) == pytest.approx(float(best[name]), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("best_by", "pick"), [("frechet", min), ("last", None)])
def test_what_is_best_can_be_chosen(tmp_path, pictures, held_out, best_by, pick):
    config = replace(SHORT, best_by=best_by, evaluate_every=2, learning_rate=1e-2)
    kept = train(tmp_path, pictures, held_out, config, adversarial=AdversarialConfig())
    evaluation = rows(tmp_path / "evaluation.csv")
    expected = evaluation[-1] if pick is None else pick(evaluation, key=lambda row: float(row["frechet"]))
    report = measure_reconstruction(kept, held_out.fitted(range(5), SIZE))
    assert report.frechet == pytest.approx(float(expected["frechet"]), rel=1e-4)


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
import test_train_families as t
from smalti.cli import app as cli
from smalti.training import run as module
save = module.save_checkpoint
def save_and_wait(*arguments):
    save(*arguments)
    if arguments[1] == 6:
        print("saved", flush=True)
        import time
        time.sleep(60)
module.save_checkpoint = save_and_wait
t.train(Path({directory!r}), t.PictureSet({pictures!r}), t.PictureSet({held_out!r}),
        t.replace(t.SHORT, sample_every=8), t.GAN_VQGAN)
"""


@pytest.mark.slow
def test_a_killed_run_ends_as_one_that_never_stopped(tmp_path, finished, pictures, held_out):
    script = SCRIPT.format(
        tests=str(Path(__file__).parent), directory=str(tmp_path), pictures=str(pictures.path),
        held_out=str(held_out.path),
    )  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert process.stdout is not None and process.stdout.readline() == "saved\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    train(tmp_path, pictures, held_out, replace(SHORT, sample_every=8), GAN_VQGAN)
    one, other = state_of(tmp_path), state_of(finished)
    assert one.step == other.step == SHORT.num_steps
    assert all(torch.equal(one.weights[name], tensor) for name, tensor in other.weights.items())
    for part in ("model", "adversary"):
        ours, theirs = one.training_state[part], other.training_state[part]
        assert theirs and all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    for name in ("evaluation.csv", "warnings.csv"):
        assert (tmp_path / name).read_text() == (finished / name).read_text()
    for ours, theirs in zip(rows(tmp_path / "training.csv"), rows(finished / "training.csv"), strict=True):
        for column in set(theirs) - set(module.HEALTH_PARTS):  # the window of codes begins anew
            assert ours[column] == theirs[column]


def test_workers_change_nothing(tmp_path, pictures, held_out):
    config = replace(SHORT, num_steps=4, evaluate_every=0)
    for name, workers in (("none", 0), ("one", 1)):
        train_gan_tokenizer(
            pictures, held_out, VIT_CONFIG, config, tmp_path / name, losses=LossConfig(),
            adversarial=AdversarialConfig(), reading=PicturesConfig(workers=workers), show_progress=False,
        )  # fmt: skip
    one, other = state_of(tmp_path / "none"), state_of(tmp_path / "one")
    assert all(torch.equal(tensor, other.weights[name]) for name, tensor in one.weights.items())


def test_without_held_out_pictures_a_tenth_is_kept_back(tmp_path, pictures):
    kept, measured = module.split_pictures(pictures, None, SIZE, READING)
    assert len(kept) == 19 and len(measured) == 2 and len(set(kept.tolist())) == 19
    missing = sorted(set(range(21)) - set(kept.tolist()))
    assert torch.equal(measured, pictures.fitted(missing, SIZE))
    few = folder_of(tmp_path / "few", scenes(9))
    with pytest.raises(InputError, match="holds 9 pictures, too few to keep a tenth back"):
        module.split_pictures(few, None, SIZE, READING)


# The two sides


@pytest.mark.parametrize("model_config", [VQGAN_CONFIG, VIT_CONFIG, TITOK_CONFIG], ids=["vqgan", "vit_vqgan", "titok"])
@pytest.mark.parametrize("network", ["patch", "stylegan2"])
def test_gradients_never_leak_between_tokenizer_and_discriminator(model_config, network):
    torch.manual_seed(0)
    families = {VQGANConfig: VQGAN, ViTVQGANConfig: ViTVQGAN, TiTokConfig: TiTok}
    size = (32, 32) if network == "patch" else SIZE
    model_config = replace(model_config, image_size=size)
    model = families[type(model_config)](model_config)
    adversary = Adversary(AdversarialConfig(weight=1.0, network=network, channels=4, r1=1.0, lecam=1.0), size)
    images = to_images(torch.from_numpy(scenes(4, rows=size[0], columns=size[1])))
    losses = tokenizer_losses(model, images, LossConfig(gradients=1.0), None, None, "float32")
    assert losses.rebuilt is not None
    verdict = adversary.verdict(losses.rebuilt)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}

    (losses.total + verdict).backward(retain_graph=True)
    assert all(parameter.grad is None for parameter in adversary.discriminator.parameters())
    assert last_weight(model).grad is not None and all(p.requires_grad for p in adversary.discriminator.parameters())
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}

    old = [parameter.clone() for parameter in adversary.discriminator.parameters()]
    adversary.learn(images, losses.rebuilt, step=0, precision="float32")
    assert any(not torch.equal(a, b) for a, b in zip(old, adversary.discriminator.parameters(), strict=True))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        grad = gradients[name]
        assert parameter.grad is None if grad is None else torch.equal(parameter.grad, grad)


def test_the_verdict_alone_reaches_the_tokenizer():
    """Not only the reconstruction losses do: with them taken out there is still a gradient, towards higher logits."""
    torch.manual_seed(0)
    adversary = Adversary(AdversarialConfig(weight=1.0, network="stylegan2", channels=4), SIZE)
    pixels = torch.rand(4, 3, *SIZE, requires_grad=True)
    adversary.verdict(pixels).backward()
    assert pixels.grad is not None
    with torch.no_grad():
        before = adversary.discriminator(pixels).mean()
        after = adversary.discriminator(pixels - 0.01 * pixels.grad / pixels.grad.abs().max()).mean()
    assert after > before


def test_the_discriminator_learns_to_tell():
    torch.manual_seed(0)
    adversary = Adversary(AdversarialConfig(weight=1.0, network="stylegan2", channels=4, learning_rate=1e-2), SIZE)
    real = to_images(torch.from_numpy(scenes(8)))
    fake = torch.nn.functional.avg_pool2d(real, 3, stride=1, padding=1)
    losses = [float(adversary.learn(real, fake, step, "float32")[0]) for step in range(40)]
    assert losses[-1] < 0.2 < losses[0]


@pytest.mark.slow
def test_a_run_says_when_the_discriminator_hurts(tmp_path, pictures, held_out):
    harmful = replace(GAN, weight=300.0, adaptive=False, start=0, warmup_steps=8, ramp_steps=0, loss="hinge")
    config = replace(SHORT, num_steps=24, evaluate_every=4, learning_rate=3e-3)
    train(tmp_path, pictures, held_out, config, adversarial=harmful)
    (warning,) = rows(tmp_path / "warnings.csv")
    assert int(warning["step"]) > 8
    assert "dB before the adversarial loss was enabled; lower adversarial.weight (300.0)" in warning["warning"]


def test_a_harmless_discriminator_gets_no_warning(finished):
    assert rows(finished / "warnings.csv") == []


# Stages


@pytest.fixture(scope="module")
def proxy(tmp_path_factory):
    directory = tmp_path_factory.mktemp("proxy")
    torch.manual_seed(0)
    save_image_tokenizer(VQGAN(PROXY_CONFIG), directory)
    return directory


TWO_STAGE = replace(TITOK_CONFIG, target="proxy_codes", proxy=PROXY_CONFIG)


@pytest.fixture(scope="module")
def first_stage(tmp_path_factory, pictures, held_out, proxy):
    directory = tmp_path_factory.mktemp("first")
    config = replace(
        SHORT, num_steps=40, stage="proxy_codes", proxy=proxy, best_by="last", evaluate_every=0, log_every=10
    )
    train(directory, pictures, held_out, config, TWO_STAGE, adversarial=AdversarialConfig())
    return directory


def test_the_first_stage_learns_the_proxys_codes(first_stage, proxy):
    training = rows(first_stage / "training.csv")
    nats = [float(row["proxy_nats"]) for row in training]
    assert all(row["l2"] == "" for row in training)
    assert abs(nats[0] - math.log(32)) < 1.0 and nats[-1] < nats[0] - 0.1
    trained, original = load_image_tokenizer(first_stage / "image_tokenizer"), load_image_tokenizer(proxy)
    assert isinstance(trained, TiTok) and isinstance(original, VQGAN)
    assert torch.equal(trained.proxy_codebook, original.quantizer.codebook)
    for name, tensor in original.decoder.state_dict().items():
        assert torch.equal(trained.proxy_decoder.state_dict()[name], tensor)


def test_the_second_stage_trains_what_comes_after_the_codes(tmp_path, first_stage, pictures, held_out):
    start_from = first_stage / "image_tokenizer"
    config = replace(SHORT, stage="decoder", start_from=start_from, best_by="last")
    after = train(tmp_path, pictures, held_out, config, TWO_STAGE, adversarial=GAN)
    before = load_image_tokenizer(start_from)
    kept_parts = {"patches_in", "latent_tokens", "encoder", "to_code", "quantizer"}
    assert kept_parts < {name.split(".")[0] for name in before.state_dict()}
    for name, tensor in before.state_dict().items():
        kept = name.split(".")[0] in kept_parts
        assert torch.equal(after.state_dict()[name], tensor) == kept, name


def test_an_enlarged_decoder_is_trained_over_codes_that_stay(tmp_path, pictures, held_out):
    torch.manual_seed(0)
    small = ViTVQGAN(replace(VIT_CONFIG, quantizer=QuantizerConfig(codebook_size=16, code_dim=4)))
    save_image_tokenizer(small, tmp_path / "small")
    enlarged = replace(small.config, decoder=replace(VIT, num_layers=3))
    config = replace(SHORT, stage="decoder", start_from=tmp_path / "small", best_by="last")
    after = train(tmp_path / "run", pictures, held_out, config, enlarged, adversarial=AdversarialConfig())
    images = to_images(torch.from_numpy(scenes(3)))
    assert isinstance(after, ViTVQGAN) and len(after.decoder.blocks) == 3
    assert torch.equal(after.encode_images(images), small.eval().encode_images(images))
    with pytest.raises(InputError, match=r"start_from .*small has image_size \(16, 16\), the model to train \(8, 8\)"):
        wrong = replace(small.config, image_size=(8, 8))
        train(tmp_path / "x", pictures, held_out, config, wrong, adversarial=AdversarialConfig())


def test_an_enlarged_convolutional_decoder_is_trained_over_codes_that_stay(tmp_path, pictures, held_out):
    """Behind a codebook of moving averages, which would go on moving."""
    torch.manual_seed(0)
    codes = QuantizerConfig(codebook_size=16, code_dim=4, update="ema", restart_below=0.1)
    small = VQGAN(replace(VQGAN_CONFIG, quantizer=codes))
    save_image_tokenizer(small, tmp_path / "small")
    levels = small.config.decoder_multipliers
    wide = replace(
        small.config, decoder_multipliers=tuple(2 * level for level in levels), decoder_attention_levels=(0,)
    )
    config = replace(SHORT, stage="decoder", start_from=tmp_path / "small", best_by="last")
    after = train(tmp_path / "run", pictures, held_out, config, wide, adversarial=AdversarialConfig())
    images = to_images(torch.from_numpy(scenes(3)))
    assert isinstance(after, VQGAN) and after.config == wide
    assert torch.equal(after.encode_images(images), small.eval().encode_images(images))
    for name, tensor in small.state_dict().items():
        if name.split(".")[0] in ("encoder", "to_code", "quantizer"):
            assert torch.equal(after.state_dict()[name], tensor), name
    untrained = small.with_decoder(wide.decoder_multipliers, wide.decoder_attention_levels)
    assert not torch.equal(after.decoder.conv_in.weight, untrained.decoder.conv_in.weight)
    deep = small.with_decoder(levels, tuple(range(len(levels))), 4).eval()
    assert sum(p.numel() for p in deep.decoder.parameters()) > sum(p.numel() for p in small.decoder.parameters())
    assert torch.equal(deep(images).images, small(images).images)  # the new blocks add nothing yet
    with pytest.raises(ValueError, match=f"are 1 levels; this tokenizer's codes need {len(levels)}"):
        small.with_decoder((1,), ())


# What cannot run is refused before it starts


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 0}, "num_steps is 0; it must be more than 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; it must be more than 0"),
        ({"final_share": 2.0}, r"final_share is 2.0; expected a share in \[0, 1\]"),
        ({"stage": "proxy_codes"}, 'stage is "proxy_codes" and proxy is None; a proxy belongs to "proxy_codes"'),
        ({"stage": "decoder"}, 'stage "decoder" keeps an encoder that was trained before; name its folder'),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        replace(SHORT, **settings)


def test_runs_that_cannot_be_are_refused(tmp_path, pictures, held_out, finished, proxy, first_stage):
    def refused(message, **given):
        with pytest.raises(InputError, match=message):
            train(given.pop("directory", tmp_path), pictures, held_out, **given)

    refused(
        r"holds a run with other settings \(training.learning_rate is 0.001 there, 0.5 here\)",
        directory=finished, config=replace(SHORT, sample_every=8, learning_rate=0.5), model=GAN_VQGAN,
    )  # fmt: skip
    refused('best_by is "lpips", but no LPIPS weights are given', config=replace(SHORT, best_by="lpips"))
    refused(
        'stage "proxy_codes" trains a TiTok .* the model is a VQGAN',
        config=replace(SHORT, stage="proxy_codes", proxy=proxy),
    )
    wide = replace(TITOK_VIT, patch_size=8)
    refused(
        "has 4 pixels per code, TiTok's decoder patch_size is 8",
        config=replace(SHORT, stage="proxy_codes", proxy=proxy), model=replace(TWO_STAGE, encoder=wide, decoder=wide),
    )  # fmt: skip
    with pytest.raises(ValueError, match="VQVAEConfig cannot be trained here; use the config of a VQGAN, ViT-VQGAN"):
        train(tmp_path, pictures, held_out, model=VQVAEConfig(image_size=16))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, pictures, held_out, monkeypatch):
    monkeypatch.setattr(module, "l2_loss", lambda ours, theirs: ours.mean() * math.nan)
    with pytest.raises(InputError, match=r"the loss of step 2 is nan: training diverged.*lower learning_rate"):
        train(tmp_path, pictures, held_out, losses=LossConfig(), adversarial=AdversarialConfig())


@pytest.mark.parametrize("learning_rate", [1e4, 1e12, 1e30])
def test_a_training_that_diverges_is_told_in_words(tmp_path, pictures, held_out, learning_rate):
    """Whatever fails first: the loss, the quantizer, or a figure that is measured."""
    config = replace(SHORT, learning_rate=learning_rate, warmup_steps=0, max_grad_norm=None, log_every=0)
    with pytest.raises(InputError, match=r"training diverged.*lower learning_rate"):
        train(tmp_path, pictures, held_out, replace(config, evaluate_every=5), GAN_VQGAN)


def test_the_learning_rate_rises_and_falls():
    config = replace(SHORT, num_steps=12, warmup_steps=2, learning_rate=1.0, final_share=0.1)
    assert [config.learning_rate_at(step) for step in (0, 1, 2, 7, 12)] == pytest.approx([0.5, 1, 1, 0.55, 0.1])


def test_every_parameter_gets_a_gradient():
    images = to_images(torch.from_numpy(scenes(4)))
    for model in (VQGAN(VQGAN_CONFIG), ViTVQGAN(VIT_CONFIG), TiTok(TITOK_CONFIG)):
        tokenizer_losses(model, images, LossConfig(), None, None, "float32").total.backward()
        assert [n for n, p in model.named_parameters() if p.grad is None] == []


# The command line


def test_a_folder_of_pictures_becomes_a_tokenizer_and_a_table(tmp_path, pictures, held_out, capsys):
    settings = [
        f"pictures={pictures.path}", f"held_out={held_out.path}", f"output={tmp_path / 'run'}", "num_steps=3",
        "train.batch_size=2", "image_tokenizer.model.image_size=[16, 16]", "reading.workers=0",
    ]  # fmt: skip
    assert cli.run(["train", "tokenizer", "vqgan", *settings, "--quiet"]) == 0
    assert f"smalti evaluate tokenizer {tmp_path / 'run'} {held_out.path}" in capsys.readouterr().out
    arguments = ["evaluate", "tokenizer", str(tmp_path / "run"), str(held_out.path), "-o", str(tmp_path / "report")]
    assert cli.run([*arguments, "--size", "16x24"]) == 0
    assert "reconstruction.json, reconstructions.png" in capsys.readouterr().out
    report = json.loads((tmp_path / "report" / "reconstruction.json").read_text())
    (figures,) = report["image_tokenizers"].values()
    assert (figures["num_pictures"], figures["image_size"], figures["codebook_size"]) == (5, [16, 24], 1024)
    assert report["command"].endswith("--size 16x24")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "tokenizer", "vqgan"], "no pictures are given; add pictures=FOLDER, or pictures=TABLE.parquet."),
        (["train", "tokenizer", "digits"], "digits is a recipe of the system digits; train it by: smalti train digits"),
        (["train", "tokenizer", "vqgan", "losses.lpips=1"], "there is no setting losses.lpips; did you mean"),
        (["train", "tokenizer", "vqgan", "pictures=nowhere"], "there is no nowhere; give a folder of pictures or"),
        (["train", "tokenizer", "vqgan", "losses.perceptual=1"], "perceptual is 1.0, but perceptual_weights names no"),
        (["evaluate", "tokenizer", "nowhere"], "only nowhere is given; name at least one image tokenizer, and the"),
        (
            ["evaluate", "tokenizer", "a", "b", "--size", "64x"],
            "--size is '64x'; expected ROWSxCOLUMNS, such as 64x48, or one number.",
        ),
        (["evaluate", "tokenizer", "a", "b", "--vgg", "x"], "LPIPS needs two files: give both --vgg and --lpips."),
    ],
)
def test_the_command_line_says_what_to_mend(arguments, message, capsys):
    assert cli.run(arguments) == 2
    assert message in capsys.readouterr().err


def test_the_tokenizer_recipes_make_small_tokenizers():
    """At most 6 MB in half precision; 9 where a TiTok carries the decoder of the VQGAN whose codes it learned, 15 where
    a decoder is an enlarged one."""
    families = {VQGANConfig: VQGAN, ViTVQGANConfig: ViTVQGAN, TiTokConfig: TiTok}
    recipes = {name: load_recipe(name) for name in shipped_recipes()}
    configs = {
        name: found.image_tokenizer.model for name, found in recipes.items() if isinstance(found, TokenizerRecipe)
    }
    assert {type(config) for config in configs.values()} == set(families)
    for name, config in configs.items():
        with torch.device("meta"):
            model = families[type(config)](config)
        most = 15e6 if name.endswith("-decoder") else 9e6 if config.grid == (1, 32) else 6e6
        assert 2 * sum(tensor.numel() for tensor in model.state_dict().values()) < most, name
        assert config.grid in ((8, 8), (1, 32)) and config.image_size in ((64, 64), (128, 128))
