"""`smalti evaluate samples`, `statistics` and `compare`: from files of pictures to a card, and two cards compared."""

import json
import os
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_bundle import save_tiny_bundle
from torch.nn import functional as F

from smalti.cli.app import run
from smalti.data.sample_sets import open_samples
from smalti.errors import InputError, InputWarning
from smalti.evaluate import samples as samples_module
from smalti.evaluate.classes import Judge
from smalti.evaluate.feature_networks import FeatureNetwork, Found, open_network, save_judge
from smalti.evaluate.moments import Moments, read_statistics
from smalti.evaluate.protocol_card import compare_cards, make_card, read_card, write_card
from smalti.evaluate.protocols import ADM, SMALTI, TORCH_FIDELITY
from smalti.evaluate.samples import MeasureConfig, extract, measure, measured, work_folder

QUICK = MeasureConfig(num_replicates=20)


def pictures(num: int, seed: int, *, size: tuple[int, int] = (28, 28), darker: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256 - darker, (num, size[0] // 4, size[1] // 4, 3))
    return coarse.repeat(4, 1).repeat(4, 2).astype(np.uint8)


def means(batch: torch.Tensor) -> Found:
    """Means of four quarters: 12 features; and three scores."""
    pooled = F.adaptive_avg_pool2d(batch.permute(0, 3, 1, 2).float(), 2).flatten(1)
    return Found(pooled, F.adaptive_avg_pool2d(batch.permute(0, 3, 1, 2).float(), (1, 2)).flatten(1), pooled[:, :3])


NETWORK = FeatureNetwork(name="means", sha256="0" * 64, compute=means)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Samples and a reference as .npz, and the reference's pictures once more as files."""
    folder = tmp_path_factory.mktemp("sets")
    np.savez(folder / "samples.npz", pictures(120, 0, darker=40))
    np.savez_compressed(folder / "reference.npz", pictures(100, 1))
    (folder / "photos").mkdir()
    for number, picture in enumerate(pictures(100, 1)):
        Image.fromarray(picture).save(folder / "photos" / f"{number:03d}.png")
    return folder


def side(path: Path, folder: Path, network: FeatureNetwork | None = NETWORK, **more):
    return measured(path, network, folder, show_progress=False, **more)


@pytest.fixture(scope="module")
def judge_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("judge") / "judge.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_judge(Judge(4).eval(), path)
    return path


# Sets of pictures ----------------------------------------------------------------------------------------------------


def test_a_set_is_read_some_at_a_time_wherever_it_lies(files):
    wanted = torch.from_numpy(pictures(100, 1))
    for name in ("reference.npz", "photos"):
        found = open_samples(files / name)
        assert len(found) == 100 and found.size == (28, 28) and len(found.sha256) == 64
        assert torch.equal(torch.cat(list(found.batches(7))), wanted)
        assert torch.equal(torch.cat(list(found.batches(7, start=37))), wanted[37:])
    cut = open_samples(files / "photos", size=(14, 7))
    assert next(cut.batches(3)).shape == (3, 14, 7, 3)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"arr_0": np.zeros((4, 3, 8, 8), np.uint8)}, r"shape \(4, 3, 8, 8\).*Transpose it"),
        ({"arr_0": np.zeros((4, 8, 8), np.uint8)}, "Grey pictures go in as three equal channels"),
        ({"arr_0": np.full((4, 8, 8, 3), np.nan, np.float32)}, "holds float32, expected uint8: .255"),
        ({"arr_0": np.zeros((0, 8, 8, 3), np.uint8)}, "holds no pictures"),
        ({"arr_0": np.zeros((4, 8, 8, 3), object)}, "expected uint8"),
        ({"x": np.zeros(3)}, "has no array arr_0; it has x"),
    ],
)
def test_sets_that_are_none_are_refused(tmp_path, arrays, said):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(InputError, match=said):
        open_samples(tmp_path / "a.npz")


def test_damage_and_other_sizes_are_told(tmp_path, files):
    content = bytearray((files / "samples.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "flipped.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"flipped\.npz: arr_0 in it is damaged"):
        list(open_samples(tmp_path / "flipped.npz").batches(50))
    (tmp_path / "cut.npz").write_bytes(content[:500])
    with pytest.raises(InputError, match=r"no whole \.npz"):
        open_samples(tmp_path / "cut.npz")
    (tmp_path / "mixed").mkdir()
    for number, side_ in enumerate((8, 8, 9)):
        Image.new("RGB", (side_, 8)).save(tmp_path / "mixed" / f"{number}.png")
    with pytest.raises(InputError, match=r"2\.png is of 8×9 .*--size ROWSxCOLUMNS"):
        list(open_samples(tmp_path / "mixed").batches(3))
    with pytest.raises(InputError, match="to resize them would be another protocol"):
        open_samples(files / "samples.npz", size=(7, 7))
    with pytest.raises(InputError, match="has no splits"):
        open_samples(files / "photos", split="test")


def test_mnists_splits_are_sets_of_their_own(shared_dir):
    test = open_samples(shared_dir / "data" / "mnist")
    assert len(test) == 5000 and next(test.batches(2)).shape == (2, 28, 28, 3)
    train = open_samples(shared_dir / "data" / "mnist", split="train")
    assert len(train) == 58_000 and train.sha256 != test.sha256  # the rest is kept for validation


# Features ------------------------------------------------------------------------------------------------------------


def test_features_are_resumed_after_a_kill(files, tmp_path):
    seen: list[int] = []

    def counted(batch: torch.Tensor) -> Found:
        seen.append(len(batch))
        if len(seen) == 4 and os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return means(batch)

    parent, network = os.getpid(), FeatureNetwork(name="means", sha256="1" * 64, compute=counted)
    samples = open_samples(files / "samples.npz")
    if not (child := os.fork()):
        extract(samples, network, tmp_path / "parts", batch_size=10, show_progress=False)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    found = extract(samples, network, tmp_path / "parts", batch_size=16, show_progress=False)
    assert sum(seen) == 90  # 30 were there
    wanted = means(torch.from_numpy(pictures(120, 0, darker=40)))
    assert torch.equal(found.pooled, wanted.pooled) and torch.equal(found.logits, wanted.logits)
    other = FeatureNetwork(name="means", sha256="2" * 64, compute=means)  # other weights: nothing is taken over
    seen.clear()
    assert torch.equal(extract(samples, other, tmp_path / "parts", show_progress=False).pooled, wanted.pooled)


def test_networks_refuse_what_they_cannot_see(files, tmp_path):
    def broken(batch: torch.Tensor) -> Found:
        pooled = means(batch).pooled
        pooled[3] = float("nan")
        return Found(pooled)

    network = FeatureNetwork(name="broken", sha256="3" * 64, compute=broken)
    with pytest.raises(InputError, match=r"samples\.npz: the broken makes NaN or infinity of picture 3"):
        extract(open_samples(files / "samples.npz"), network, tmp_path / "a", show_progress=False)
    fixed = FeatureNetwork(name="tokenizer", sha256="4" * 64, compute=means, picture_size=(32, 32))
    with pytest.raises(InputError, match="pictures are of 28×28, the tokenizer takes 32×32"):
        extract(open_samples(files / "samples.npz"), fixed, tmp_path / "b", show_progress=False)


def test_convolutions_are_whole_float32_while_features_are_computed():
    inside = []

    def noted(batch: torch.Tensor) -> Found:
        inside.append(torch.backends.cudnn.allow_tf32)
        return means(batch)

    before = torch.backends.cudnn.allow_tf32
    FeatureNetwork(name="means", sha256="5" * 64, compute=noted)(torch.from_numpy(pictures(2, 0)))
    assert inside == [False] and torch.backends.cudnn.allow_tf32 == before


def test_a_judge_comes_back_from_its_file(judge_file):
    network = open_network(judge_file, SMALTI)
    found = network(torch.from_numpy(pictures(3, 0)))
    assert network.name == "judge" and found.pooled.shape == (3, 64)
    assert found.logits is not None and found.logits.shape == (3, 4)


def test_clip_is_read_from_its_folder(tmp_path, files):
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4,
        projection_dim=6,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = transformers.CLIPVisionModelWithProjection(config).eval()
    network.save_pretrained(tmp_path / "clip")
    said = {"crop_size": {"height": 8, "width": 8}, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    (tmp_path / "clip" / "preprocessor_config.json").write_text(json.dumps(said))
    opened = open_network(tmp_path / "clip", SMALTI)
    assert opened.name == "clip" and opened.resizer == "bicubic, antialiased, to 8×8, not cropped"
    given = pictures(2, 0, size=(8, 8))  # of its own size, so that nothing is resized
    normal = (torch.from_numpy(given).permute(0, 3, 1, 2) / 255 - torch.tensor(said["image_mean"]).view(3, 1, 1)) / (
        torch.tensor(said["image_std"]).view(3, 1, 1)
    )
    with torch.inference_mode():
        wanted = network(pixel_values=normal).image_embeds
    assert torch.allclose(opened(torch.from_numpy(given)).pooled, wanted, atol=1e-4)
    with pytest.raises(InputError, match="has the SHA-256"):
        open_network(tmp_path / "clip", SMALTI, sha256="ab")


# Figures -------------------------------------------------------------------------------------------------------------


def test_equal_sets_are_at_the_end_of_every_scale(files, tmp_path):
    one, other = side(files / "reference.npz", tmp_path / "a"), side(files / "photos", tmp_path / "b")
    found = measure(one, other, SMALTI, QUICK, show_progress=False).found
    for name in ("frechet", "frechet_spatial", "mind"):
        assert found[name].value == pytest.approx(0, abs=1e-6), name
    assert found["precision"].value == found["recall"].value == found["coverage"].value == 1
    assert found["kid"].value < 0 and found["inception_score"].value > 1  # of all pairs but those with itself
    assert all(len(figure.replicates) == 20 for name, figure in found.items() if name != "frechet_infinity")


def test_figures_do_not_depend_on_the_order_or_on_shards(files, tmp_path):
    """Of statistics: whole, and merged from three shards in another order, by the command that makes them."""
    given = pictures(100, 1)
    order = np.random.default_rng(3).permutation(100)
    parts = []
    for number, rows in enumerate(np.split(order, [13, 60])):
        np.savez(tmp_path / f"shard-{number}.npz", given[rows])
        parts.append(str(tmp_path / f"shard-{number}.npz"))
    bundle = str(save_tiny_bundle(tmp_path / "tiny"))
    how = ["--features", "tokenizer", "--bundle", bundle, "--quiet"]
    assert run(["evaluate", "statistics", str(files / "photos"), "-o", str(tmp_path / "whole.npz"), *how]) == 0
    assert run(["evaluate", "statistics", *parts[:2], "-o", str(tmp_path / "two.npz"), *how]) == 0
    both = [parts[2], str(tmp_path / "two.npz")]
    assert run(["evaluate", "statistics", *both, "-o", str(tmp_path / "merged.npz"), *how]) == 0
    whole, merged = (read_statistics(tmp_path / name) for name in ("whole.npz", "merged.npz"))
    assert whole.pooled.num == merged.pooled.num == 100 and whole.pooled.width == 16 * 5
    assert torch.allclose(whole.pooled.mean, merged.pooled.mean, rtol=0, atol=1e-6)
    assert torch.allclose(whole.pooled.covariance, merged.pooled.covariance, rtol=0, atol=1e-6)
    values = []
    for name in ("whole.npz", "merged.npz"):
        output = tmp_path / f"card-{name}"
        words = ["evaluate", "samples", str(files / "samples.npz"), "--reference", str(tmp_path / name)]
        assert run([*words, "-o", str(output), "--bootstrap", "3", *how]) == 0
        card = read_card(output)
        assert set(card["figures"]) == {"frechet"}  # nothing more can be told of statistics
        assert card["reference"]["num"] == 100 and card["features"]["name"] == "tokenizer"
        values.append(card["figures"]["frechet"]["value"])
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_adms_reference_files_go_before_their_own_pictures(files, tmp_path):
    """`mu` and `sigma` of a training set beside 10,000 of its pictures: distances are from the statistics, neighbours
    among the pictures."""
    features = means(torch.from_numpy(pictures(100, 1)))
    shifted = Moments.of(features.pooled + 5).gaussian
    spatial = Moments.of(features.spatial).gaussian
    arrays = {"mu": shifted.mean, "sigma": shifted.covariance, "mu_s": spatial.mean, "sigma_s": spatial.covariance}
    np.savez(tmp_path / "ref.npz", arr_0=pictures(100, 1), **{name: t.numpy() for name, t in arrays.items()})
    one, other = side(files / "photos", tmp_path / "a"), side(tmp_path / "ref.npz", tmp_path / "b")
    with pytest.warns(InputWarning, match="of 50,000 samples, these of 100"):
        found = measure(one, other, ADM, QUICK, show_progress=False).found
    assert found["frechet"].value == pytest.approx(12 * 25, rel=1e-6)
    assert found["frechet_spatial"].value == pytest.approx(0, abs=1e-6) and found["precision"].value == 1
    assert other.about["num"] == 100 and other.about["num_of_statistics"] == "not said"


def test_splits_and_subsets_are_the_protocols(files, tmp_path):
    one, other = side(files / "samples.npz", tmp_path / "a"), side(files / "photos", tmp_path / "b")
    found = measure(one, other, TORCH_FIDELITY, QUICK, show_progress=False).found
    assert "kid_subsets" not in found  # of fewer than 1,000 pictures there are none
    assert found["inception_score_splits"].value < found["inception_score"].value
    only = MeasureConfig(figures=("precision", "mind"), num_replicates=0)
    found = measure(one, other, SMALTI, only, show_progress=False).found
    assert list(found) == ["precision", "mind"] and found["mind"].interval is None
    with pytest.raises(ValueError, match="there is no figure 'fid'; choose of frechet"):
        MeasureConfig(figures=("fid",))


def test_too_few_pictures_are_warned_of_and_other_sizes_refused(files, tmp_path):
    np.savez(tmp_path / "few.npz", pictures(9, 0))
    few, other = side(tmp_path / "few.npz", tmp_path / "a"), side(files / "photos", tmp_path / "b")
    with pytest.warns(InputWarning, match="9 pictures of the samples are no more than the 12 features"):
        notes = measure(few, other, SMALTI, QUICK, show_progress=False).notes
    assert len(notes) == 1
    np.savez(tmp_path / "large.npz", pictures(50, 0, size=(32, 32)))
    large = side(tmp_path / "large.npz", tmp_path / "c")
    with pytest.raises(InputError, match=r"32×32 pixels .*the reference of 28×28, and these features see pictures as"):
        measure(large, other, SMALTI, QUICK, show_progress=False)
    with pytest.warns(InputWarning, match="is one of sharpness, too"):
        measure(large, other, TORCH_FIDELITY, QUICK, resizer="tf1 to 299×299", show_progress=False)
    np.savez(tmp_path / "one.npz", pictures(1, 0))
    with pytest.raises(InputError, match="holds 1 picture; a distance needs at least 2"):
        side(tmp_path / "one.npz", tmp_path / "d")


def test_features_of_any_network_are_measured(tmp_path, capsys):
    random = np.random.default_rng(0)
    np.savez(tmp_path / "a.npz", features=random.normal(size=(200, 5)).astype(np.float32))
    np.savez(tmp_path / "b.npz", features=random.normal(0.5, 1, (180, 5)).astype(np.float32))
    words = ["evaluate", "samples", str(tmp_path / "a.npz"), "--reference", str(tmp_path / "b.npz"), "--quiet"]
    assert run([*words, "--features", "given", "--bootstrap", "5"]) == 0
    assert "Fréchet distance" in (said := capsys.readouterr().out) and "coverage" in said
    with pytest.raises(InputError, match="does not say of which network: they are measured by --features given"):
        side(tmp_path / "a.npz", tmp_path)
    np.savez(tmp_path / "nan.npz", features=np.array([[1.0, 2], [np.nan, 1]]))
    with pytest.raises(InputError, match="features of picture 1 hold NaN"):
        side(tmp_path / "nan.npz", tmp_path, None)
    np.savez(tmp_path / "c.npz", features=random.normal(size=(20, 4)))
    with pytest.raises(InputError, match="5 numbers wide, the reference's 4"):
        measure(side(tmp_path / "a.npz", tmp_path, None), side(tmp_path / "c.npz", tmp_path, None), SMALTI, QUICK)


def test_what_does_not_go_together_is_told(files, judge_file, tmp_path, capsys):
    samples, reference = str(files / "samples.npz"), str(files / "photos")
    for words, said in (
        (["--features", "judge", "--protocol", "adm"], "is one of Inception: give its weight file"),
        (["--features", "tokenizer"], "--features tokenizer and --bundle go together"),
        (["--features", "given", "--features-sha256", "ab"], "leave it out"),
        (["--features", "given"], "holds pictures; say by --features"),
        (["--features", str(judge_file), "--protocol", "clean-fid"], "holds the judge"),
        (["--features", str(judge_file), "--protocol", "tf"], "protocol 'tf' is unknown"),
        (["--features", str(judge_file), "--features-sha256", "00"], "expected 00: figures of other weights"),
        (["--features", str(tmp_path / "none.pth")], "not a file"),
        (["--features", str(judge_file), "--figures", "fid"], "there is no figure 'fid'"),
    ):
        assert run(["evaluate", "samples", samples, "--reference", reference, *words, "--quiet"]) == 2
        assert said in (error := capsys.readouterr().err) and error.count("\n") == 1
    # Statistics of one network are not measured with another.
    how = ["--features", str(judge_file), "--quiet"]
    assert run(["evaluate", "statistics", reference, "-o", str(tmp_path / "s.npz"), *how]) == 0
    with pytest.raises(InputError, match=r"statistics of the judge with sha256 .*they do not compare"):
        side(tmp_path / "s.npz", tmp_path / "x")


# Cards --------------------------------------------------------------------------------------------------------------


def card_of(samples: Path, reference: Path, folder: Path, protocol=SMALTI, config=QUICK) -> dict:
    with work_folder(None) as work, warnings.catch_warnings():
        warnings.simplefilter("ignore", InputWarning)
        ours, theirs = side(samples, work / "a"), side(reference, work / "b")
        found = measure(ours, theirs, protocol, config, show_progress=False)
        card = make_card(found, ours, theirs, NETWORK, protocol, config, "smalti evaluate samples …")
    write_card(card, folder)
    return read_card(folder)


def drawn_beside(path: Path, guidance_scale: float, seed: int = 0) -> None:
    """As smalti sample notes it."""
    card = {
        "seed": seed,
        "num": 120,
        "labels": "balanced",
        "classes": [0],
        "sampling": {"guidance_scale": guidance_scale},
    }
    path.with_name(path.name + ".card.json").write_text(json.dumps(card))


@pytest.fixture(scope="module")
def cards(tmp_path_factory) -> dict[str, dict]:
    """Two models that draw nearly alike from the same seeds, one that draws worse, and the first one again from other
    seeds."""
    folder = tmp_path_factory.mktemp("cards")
    np.savez(folder / "reference.npz", pictures(150, 9))
    close = pictures(120, 0, darker=40)
    sets = {
        "a": close,
        "b": np.clip(close.astype(int) + 1, 0, 255).astype(np.uint8),
        "worse": pictures(120, 0, darker=150),
    }
    sets["again"] = pictures(120, 5, darker=40)
    found = {}
    for name, one in sets.items():
        np.savez(folder / f"{name}.npz", one)
        drawn_beside(folder / f"{name}.npz", {"a": 1.0, "b": 1.5}.get(name, 1.0), seed=7 if name == "again" else 0)
        found[name] = card_of(folder / f"{name}.npz", folder / "reference.npz", folder / f"card-{name}")
    found["folder"] = folder
    return found


def test_a_card_holds_all_that_its_numbers_depend_on(cards):
    card = cards["a"]
    assert card["features"]["sha256"] == "0" * 64 and card["samples"]["drawn"]["seed"] == 0
    assert card["reference"]["num"] == 150 and len(card["reference"]["sha256"]) == 64
    assert set(card["versions"]) == {"smalti", "torch", "numpy", "pillow", "python"}
    text = (cards["folder"] / "card-a" / "card.md").read_text()
    for said in ("Fréchet distance", "bootstrap of 20 replicates", "samples.drawn.sampling.guidance_scale | 1.0"):
        assert said in text
    low, high = card["figures"]["frechet"]["interval"]
    assert low < card["figures"]["frechet"]["value"] < high


def test_the_same_seeds_make_a_paired_test(cards):
    found = compare_cards(cards["a"], cards["b"], ("A", "B"))
    assert found.paired and found.decisive == () and set(found.different) == {"samples.drawn.sampling.guidance_scale"}
    apart = found.figures["frechet"][2]
    assert apart.paired and abs(apart.value) < 0.2 * cards["a"]["figures"]["frechet"]["standard_error"] * 20
    independent = compare_cards(cards["a"], cards["again"], ("A", "B")).figures["frechet"][2]
    assert not independent.paired and apart.standard_error < 0.2 * independent.standard_error
    same = compare_cards(cards["a"], cards["a"], ("A", "B"))
    assert same.different == {} and all(
        same.verdict(name) in ("within noise", "noise not known") for name in same.figures
    )


def test_differences_beyond_noise_are_told_from_noise(cards):
    worse = compare_cards(cards["a"], cards["worse"], ("A", "B"))
    assert worse.verdict("frechet") == "A is better" and worse.figures["frechet"][2].p_value < 1e-6
    again = compare_cards(cards["a"], cards["again"], ("A", "B"))
    assert again.verdict("frechet") == "within noise" and "independent" in again.how


def test_another_protocol_does_not_compare(cards, tmp_path, capsys):
    folder = cards["folder"]
    other = card_of(folder / "a.npz", folder / "reference.npz", tmp_path / "other", protocol=TORCH_FIDELITY)
    found = compare_cards(cards["a"], other, ("A", "B"))
    assert {"protocol.name", "protocol.resizer"} <= set(found.decisive) and found.verdict("frechet") == "not comparable"
    few = tmp_path / "few.npz"
    np.savez(few, pictures(60, 0, darker=40))
    of_few = card_of(few, folder / "reference.npz", tmp_path / "few")
    assert "samples.num" in compare_cards(cards["a"], of_few, ("A", "B")).decisive
    words = ["evaluate", "compare", str(folder / "card-a"), str(tmp_path / "other" / "card.json")]
    assert run([*words, "-o", str(tmp_path / "compared.md")]) == 0
    assert "protocol.resizer" in (said := capsys.readouterr().out) and "do not compare, as these fields differ" in said
    assert "| protocol.resizer | none | tf1 | not comparable |" in (tmp_path / "compared.md").read_text()


def test_what_is_no_card_is_refused(cards, tmp_path, capsys):
    (tmp_path / "a.json").write_text('{"kind": "smalti protocol card", "figures": {"frechet": {"value": "x"}}}')
    for path in (tmp_path / "a.json", tmp_path / "none"):
        assert run(["evaluate", "compare", str(path), str(cards["folder"] / "card-a")]) == 2
        assert "smalti evaluate samples wrote" in capsys.readouterr().err
    (tmp_path / "b.npz.card.json").write_text('{"sha256": "00"}')
    np.savez(tmp_path / "b.npz", pictures(120, 0))
    with pytest.raises(InputError, match="says how other pictures were drawn"):
        card_of(tmp_path / "b.npz", cards["folder"] / "reference.npz", tmp_path / "b")


def test_the_commands_go_from_pictures_to_a_verdict(files, judge_file, tmp_path, capsys, monkeypatch):
    """And a run that is stopped between the two sets keeps the features of the first."""
    how = ["--reference", str(files / "photos"), "--features", str(judge_file), "--bootstrap", "5", "--quiet"]
    words = ["evaluate", "samples", str(files / "samples.npz"), "-o", str(tmp_path / "card"), *how]
    plain, calls = samples_module.measure, []
    monkeypatch.setattr(
        "smalti.evaluate.samples.measure", lambda *_, **__: (_ for _ in ()).throw(InputError("stopped"))
    )
    assert run(words) == 2 and (tmp_path / ".card.parts" / "samples" / "pooled.npy").exists()
    monkeypatch.setattr("smalti.evaluate.samples.measure", plain)
    original = Judge.forward
    monkeypatch.setattr(Judge, "forward", lambda self, images: calls.append(len(images)) or original(self, images))
    assert run(words) == 0 and calls == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["card"]
    assert "card.json, card.md" in capsys.readouterr().out
    assert run(words) == 2 and "exists already" in capsys.readouterr().err
    assert run(["evaluate", "compare", str(tmp_path / "card"), str(tmp_path / "card")]) == 0
    assert "within noise" in capsys.readouterr().out
