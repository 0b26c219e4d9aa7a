"""Super-resolution: the network against plain arithmetic, its training, the bundle that carries it, what it refuses."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from test_train_families import folder_of, rows, scenes
from tiny_bundle import tiny_pipeline
from torch.nn import functional as F

from smalti.bundle import Bundle, add_upsampler
from smalti.cli import app as cli
from smalti.data.picture_sets import PicturesConfig
from smalti.errors import InputError
from smalti.evaluate.reconstruction import RandomFeatures
from smalti.evaluate.upsampling import UPSAMPLER, measure_upsampling, methods_beside, rebuilt, shrunk
from smalti.image_files import RECEIPT, read_picture, read_receipt
from smalti.image_tokenizers import save_image_tokenizer
from smalti.image_tokenizers.losses import AdversarialConfig, LossConfig
from smalti.image_tokenizers.quantizer import QuantizerConfig
from smalti.image_tokenizers.vqgan import VQGAN, VQGANConfig
from smalti.tasks.images import Pipeline
from smalti.tasks.replay import replay
from smalti.training import upsampler as training
from smalti.training.upsampler import TrainUpsamplerConfig, train_upsampler
from smalti.upsample import (
    PRESETS,
    Upsampler,
    UpsamplerConfig,
    load_upsampler,
    save_upsampler,
    upsample_chain,
)

SMALL = UpsamplerConfig(image_size=(8, 12), width=6, num_blocks=2, expansion=3, mean=(0.4, 0.5, 0.6))
SHORT = TrainUpsamplerConfig(
    num_steps=7, batch_size=3, learning_rate=2e-3, warmup_steps=2, ema_decay=0.5, precision="float32",
    evaluate_every=4, checkpoint_every=3, log_every=2, crop=4,
)  # fmt: skip
CAPTION = "dark green eight on bright cyan"


def trained_like(config: UpsamplerConfig, seed: int = 0) -> Upsampler:
    """Weights as a training might leave them: norms that are not those of the directions."""
    torch.manual_seed(seed)
    upsampler = Upsampler(config).eval()
    for name, parameter in upsampler.named_parameters():
        if name.endswith("original0"):
            parameter.data.mul_(torch.rand_like(parameter) + 0.5)
    return upsampler


@pytest.mark.parametrize("scale", [2, 4])
def test_the_network_is_wdsr_written_out(scale):
    """Weight norm, blocks, shuffled pixels and the skip by plain convolutions."""
    upsampler = trained_like(replace(SMALL, scale=scale))
    state = dict(upsampler.state_dict())

    def convolution(name: str, x: torch.Tensor, mode: str = "constant") -> torch.Tensor:
        norm, direction = (state[f"{name}.parametrizations.weight.original{i}"] for i in (0, 1))
        weight = norm * direction / direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        margin = weight.shape[-1] // 2
        return F.conv2d(F.pad(x, (margin,) * 4, mode=mode), weight, state[f"{name}.bias"])

    images, mean = torch.rand(2, 3, 8, 12), torch.tensor(SMALL.mean).view(3, 1, 1)
    x = convolution("head", images - mean)
    for i in range(2):
        x = x + convolution(f"blocks.{i}.narrow", convolution(f"blocks.{i}.widen", x).relu())
    x = convolution("tail", x) + convolution("skip", images - mean, "replicate")
    B, _, H, W = x.shape
    shuffled = x.view(B, 3, scale, scale, H, W).permute(0, 1, 4, 2, 5, 3).reshape(B, 3, H * scale, W * scale)
    with torch.no_grad():
        torch.testing.assert_close(upsampler(images), shuffled + mean)


@pytest.mark.parametrize("scale", [2, 4])
def test_it_begins_as_bicubic_interpolation(scale):
    """The skip alone, against Pillow, away from borders, where Pillow has other rules."""
    upsampler = Upsampler(replace(SMALL, scale=scale, image_size=(12, 12)))
    upsampler.tail.parametrizations.weight.original0.data.zero_()
    pixels = np.random.default_rng(0).integers(60, 190, (12, 12, 3), np.uint8)
    wanted = np.asarray(Image.fromarray(pixels).resize((12 * scale,) * 2, Image.Resampling.BICUBIC)) / 255
    with torch.no_grad():
        found = upsampler(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255)[0].permute(1, 2, 0).numpy()
    inside = slice(3 * scale, -3 * scale)
    assert np.abs(found - wanted)[inside, inside].max() < 0.0041  # Pillow rounds to bytes, twice


def test_sizes_are_published_and_chains_fit():
    with torch.device("meta"):
        large = {name: Upsampler(config) for name, config in PRESETS.items()}
    assert {name: round(one.num_parameters / 1e6, 1) for name, one in large.items()} == {
        "parti-512": 14.2, "parti-1024": 14.2
    }  # fmt: skip
    tiny = [Upsampler(replace(config, width=2, num_blocks=1, expansion=1)) for config in PRESETS.values()]
    assert upsample_chain(tiny, torch.zeros(1, 3, 256, 256)).shape == (1, 3, 1024, 1024)
    with pytest.raises(InputError, match=r"pictures of 256 × 256 pixels, and this upsampler \(×2\) takes 512 × 512"):
        upsample_chain(tiny[::-1], torch.zeros(1, 3, 256, 256))


def test_pictures_do_not_depend_on_their_company_and_survive_a_folder(tmp_path):
    upsampler, images = trained_like(SMALL), torch.rand(3, 3, 8, 12)
    save_upsampler(upsampler, tmp_path)
    loaded = load_upsampler(tmp_path)
    assert loaded.config == SMALL
    together = loaded.upsample(images)
    assert torch.equal(together[1], upsampler.upsample(images[1:2])[0])
    assert float(together.min()) >= 0 and float(together.max()) <= 1
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(InputError, match="damaged or was changed"):
        load_upsampler(tmp_path)
    with pytest.raises(InputError, match="holds no upsampler"):
        load_upsampler(tmp_path / "elsewhere")


def test_the_distance_of_fixed_filters_grows_with_blur_and_is_zero_for_equal_pictures():
    features, truth = RandomFeatures(), torch.from_numpy(scenes(3, rows=32, columns=32)).permute(0, 3, 1, 2) / 255
    distances = [
        features.distance(F.avg_pool2d(truth, k, 1, k // 2, count_include_pad=False), truth) for k in (1, 3, 7)
    ]
    assert float(distances[0].abs().max()) < 1e-10
    assert bool((distances[0] < distances[1]).all()) and bool((distances[1] < distances[2]).all())


# Training ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def image_tokenizer():
    torch.manual_seed(0)
    return VQGAN(
        VQGANConfig(
            quantizer=QuantizerConfig(codebook_size=16, code_dim=4), image_size=(8, 12), channels=32,
            encoder_multipliers=(1, 1), decoder_multipliers=(1, 1), encoder_attention_levels=(),
            decoder_attention_levels=(), num_res_blocks=1, latent_channels=8,
        )
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("pictures"), scenes(21, rows=20, columns=30))


def train(directory, pictures, image_tokenizer, config=SHORT, model=SMALL, adversarial=None):
    return train_upsampler(
        pictures, None, image_tokenizer, model, config, directory, losses=LossConfig(l2=0, l1=1, gradients=0.3),
        adversarial=adversarial or AdversarialConfig(), reading=PicturesConfig(workers=0), show_progress=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory, pictures, image_tokenizer):
    directory = tmp_path_factory.mktemp("finished")
    gan = AdversarialConfig(weight=0.1, network="stylegan2", start=2, warmup_steps=1, ramp_steps=2, channels=4)
    train(directory, pictures, image_tokenizer, adversarial=gan)
    return directory, gan


def test_a_run_logs_its_losses_and_keeps_the_best(finished):
    directory, _ = finished
    training_rows, evaluation = rows(directory / "training.csv"), rows(directory / "evaluation.csv")
    assert [row["step"] for row in training_rows] == ["2", "4", "6"]
    assert [row["step"] for row in evaluation] == ["0", "4", "7"]
    assert training_rows[0]["generator"] == "" and training_rows[-1]["generator"] and training_rows[-1]["discriminator"]
    assert all(float(row["l1"]) > 0 and row["l2"] == "" for row in training_rows)
    assert load_upsampler(directory).config == SMALL


def test_a_killed_run_ends_as_one_that_never_stopped(tmp_path, finished, pictures, image_tokenizer, monkeypatch):
    directory, gan = finished
    plain, calls = training._learn, []

    def learn(*given):
        calls.append(0)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return plain(*given)

    monkeypatch.setattr(training, "_learn", learn)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, pictures, image_tokenizer, adversarial=gan)
    monkeypatch.setattr(training, "_learn", plain)
    ended = train(tmp_path, pictures, image_tokenizer, adversarial=gan)
    for name, tensor in load_upsampler(directory).state_dict().items():
        assert torch.equal(ended.state_dict()[name], tensor), name
    assert (tmp_path / "evaluation.csv").read_text() == (directory / "evaluation.csv").read_text()
    with pytest.raises(InputError, match="holds a run with other settings"):
        train(tmp_path, pictures, image_tokenizer, replace(SHORT, batch_size=2), adversarial=gan)


def test_training_beats_bicubic_on_what_it_learns_from(tmp_path, pictures, image_tokenizer):
    config = replace(SHORT, num_steps=30, batch_size=8, crop=0, evaluate_every=0, checkpoint_every=0, ema_decay=0.0)
    upsampler = train(tmp_path, pictures, image_tokenizer, config)
    seen = pictures.fitted(range(21), SMALL.output_size)
    found = measure_upsampling(methods_beside(upsampler), image_tokenizer, seen, SMALL.image_size)
    assert found[UPSAMPLER].psnr_db > max(found["bicubic"].psnr_db, found["Lanczos"].psnr_db) + 0.5
    # One of the figures by hand.
    truth = seen.permute(0, 3, 1, 2) / 255
    ours = upsampler.upsample(rebuilt(image_tokenizer, shrunk(truth, SMALL.image_size)))
    assert found[UPSAMPLER].psnr_db == pytest.approx(float(-10 * (ours - truth).square().mean().log10()), abs=1e-3)


def test_what_cannot_be_trained_is_refused_before_it_starts(tmp_path, pictures, image_tokenizer):
    with pytest.raises(InputError, match="30×20 pixels, and ×4 of 8×12 gives 32×48"):
        train(tmp_path, pictures, image_tokenizer, model=replace(SMALL, scale=4))
    with pytest.raises(InputError, match="cannot take pictures of 7×9"):
        train(tmp_path, pictures, image_tokenizer, model=replace(SMALL, image_size=(7, 9)))
    with pytest.raises(InputError, match="adaptive needs a last layer"):
        train(tmp_path, pictures, image_tokenizer, adversarial=AdversarialConfig(weight=1, adaptive=True))
    for wrong, match in (({"scale": 3}, "scale is 3; expected 2 or 4"), ({"width": 0}, "width is 0")):
        with pytest.raises(ValueError, match=match):
            replace(SMALL, **wrong)


# Bundles ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A bundle of digits with an upsampler, its folder and that of the upsampler."""
    folder = tmp_path_factory.mktemp("large")
    tiny_pipeline().save(folder / "plain")
    save_upsampler(trained_like(replace(SMALL, image_size=(28, 28))), folder / "run" / "upsampler")
    assert cli.run(["add-upsampler", str(folder / "plain"), str(folder / "run"), "-o", str(folder / "bundle")]) == 0
    return folder


def test_a_bundle_carries_an_upsampler(large, tmp_path, capsys):
    plain, bundle = Bundle.load(large / "plain"), Bundle.load(large / "bundle")
    assert bundle.weights_sha256 == plain.weights_sha256 and plain.upsampler_sha256 is None
    assert bundle.upsampler is not None and bundle.upsampler.config.output_size == (56, 56)
    assert "With `--upscale` they are 56×56" in (large / "bundle" / "README.md").read_text()
    bundle.save(tmp_path / "again")
    assert Bundle.load(tmp_path / "again").upsampler_sha256 == bundle.upsampler_sha256
    assert cli.run(["info", str(large / "bundle")]) == 0 and "to 56×56 (--upscale)" in capsys.readouterr().out
    (tmp_path / "again" / "upsampler" / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"lacks upsampler/model\.safetensors"):
        Bundle.load(tmp_path / "again")


def test_pictures_are_drawn_larger_and_drawn_again(large, tmp_path, capsys):
    pipe = Pipeline.load(large / "bundle")
    drawn, upscaled = pipe.generate(CAPTION, seed=3, scale=1)[0], pipe.generate(CAPTION, seed=3, upscale=True)[0]
    receipts = [json.loads(one.info[RECEIPT]) for one in (drawn, upscaled)]
    assert drawn.size == (28, 28) and upscaled.size == (56, 56) and receipts[0]["codes"] == receipts[1]["codes"]
    assert receipts[1]["upsampler_sha256"] == pipe.bundle.upsampler_sha256 and "upsampler_sha256" not in receipts[0]
    images = pipe.decode_images(torch.tensor(receipts[0]["codes"]).view(1, 7, 7)).clamp(0, 1)
    assert pipe.bundle.upsampler is not None
    wanted = pipe.bundle.upsampler.upsample((images * 255).round() / 255)[0].permute(1, 2, 0)
    assert np.array_equal(np.asarray(upscaled), (wanted * 255).round().byte().numpy())
    path = tmp_path / "large.png"
    command = ["generate", CAPTION, "-o", str(path), "--bundle", str(large / "bundle"), "--seed", "3", "--upscale"]
    assert cli.run([*command, "-n", "2", "--grid"]) == 0, capsys.readouterr().err
    assert read_picture(path).size == (56 * 2 + 4, 56)
    assert replay(path, large / "bundle").difference is None
    with pytest.raises(InputError, match=r"made larger by an upsampler of sha256 .* has none"):
        replay(path, large / "plain")
    assert "upsampler_sha256" in read_receipt(path)["pictures"][0]


def test_upsamplers_that_do_not_fit_are_refused(large, tmp_path, capsys):
    save_upsampler(trained_like(SMALL), tmp_path / "other")
    with pytest.raises(
        InputError, match=r"tiny has pictures of 28 × 28 pixels, and this upsampler \(×2\) takes 8 × 12"
    ):
        add_upsampler(large / "plain", tmp_path / "other", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
    with pytest.raises(InputError, match="takes 8 × 12"):
        replace(Bundle.load(large / "plain"), upsampler=trained_like(SMALL))
    with pytest.raises(InputError, match="has no upsampler; train one"):
        Pipeline.load(large / "plain").generate(CAPTION, upscale=True)
    out = str(tmp_path / "a.png")
    assert cli.run(["generate", CAPTION, "-o", out, "--bundle", str(large / "plain"), "--upscale"]) == 2
    assert "has no upsampler" in capsys.readouterr().err


def test_the_commands_train_and_measure(pictures, image_tokenizer, tmp_path, capsys):
    save_image_tokenizer(image_tokenizer, tmp_path / "tokenizer")
    names = [str(pictures.path), f"image_tokenizer={tmp_path / 'tokenizer'}", f"output={tmp_path / 'run'}"]
    settings = ["model.image_size=[8,12]", "width=4", "num_blocks=1", "num_steps=2", "batch_size=2", "workers=0"]
    more = ["held_out=null", "reading.held_out_pictures=4", f"pictures={names[0]}", *names[1:], *settings]
    assert cli.run(["train", "upsampler", "emoji-upsampler", *more, "--quiet"]) == 0, capsys.readouterr().err
    assert "smalti evaluate upsampler" in capsys.readouterr().out
    measure = [
        "evaluate",
        "upsampler",
        str(tmp_path / "run"),
        names[0],
        "--image-tokenizer",
        str(tmp_path / "tokenizer"),
    ]
    assert cli.run([*measure, "-o", str(tmp_path / "report"), "--quiet"]) == 0
    report = json.loads((tmp_path / "report" / "upsampling.json").read_text())
    assert list(report["methods"]) == ["nearest", "bicubic", "Lanczos", UPSAMPLER] and report["num_pictures"] == 21
    assert cli.run(["train", "upsampler", "emoji-vqgan"]) == 2
    assert "is a recipe of the system image tokenizer" in capsys.readouterr().err
    assert cli.run(["train", "upsampler", "emoji-upsampler", "pictures=null"]) == 2
    assert "give both" in capsys.readouterr().err
