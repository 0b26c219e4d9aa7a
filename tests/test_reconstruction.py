"""Measuring image tokenizers: figures against other implementations and by hand, feature space, table, grid, JSON."""

import io
import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.linalg
import torch
from PIL import Image, ImageFilter
from torchmetrics.functional.image import structural_similarity_index_measure

from smalti.data.picture_sets import PicturesConfig, PictureSet, fit, random_fit, training_batches
from smalti.errors import InputError, InputWarning
from smalti.evaluate.reconstruction import (
    FEATURE_SPACE,
    RandomFeatures,
    ReconstructionReport,
    compare_tokenizers,
    find_image_tokenizer,
    frechet_distance,
    measure_reconstruction,
    ssim,
    to_images,
)
from smalti.image_tokenizers import save_image_tokenizer
from smalti.image_tokenizers.perceptual import LPIPS
from smalti.image_tokenizers.quantizer import FSQConfig, QuantizerConfig
from smalti.image_tokenizers.vqgan import VQGAN, VQGANConfig

pytestmark = pytest.mark.filterwarnings("ignore:.*hidden files passed over:smalti.errors.InputWarning")


def scenes(num, rows=24, columns=24, seed=0):
    """Bytes of pictures with edges and shading: rectangles of random colours on gradients."""
    random = np.random.default_rng(seed)
    pictures = np.empty((num, rows, columns, 3), np.uint8)
    for picture in pictures:
        picture[:] = np.linspace(0, 255, rows)[:, None, None] * random.random(3)
        for _ in range(3):
            top, left = random.integers(rows - 4), random.integers(columns - 4)
            picture[top : top + random.integers(3, 12), left : left + random.integers(3, 12)] = random.integers(
                0, 256, 3
            )
    return pictures


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Nine PNGs of 24 x 31 pixels in two folders, and files that are no pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "b").mkdir()
    for i, picture in enumerate(scenes(9, 24, 31)):
        Image.fromarray(picture).save(folder / ("b" if i > 5 else ".") / f"{i}.png")
    (folder / "notes.txt").write_text("not a picture")
    (folder / ".hidden.png").write_bytes(b"nor this")
    return folder


def table_of(path, pictures):
    images = []
    for picture in pictures:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, format="PNG")
        images.append(buffer.getvalue())
    pq.write_table(pa.table({"image": images}), path)
    return path


# Pictures


def test_a_folder_and_a_table_give_the_same_pictures(folder, tmp_path):
    with pytest.warns(InputWarning, match=r"1 hidden files passed over \(the first: .hidden.png\)"):
        from_folder = PictureSet(folder)
    from_table = PictureSet(table_of(tmp_path / "t.parquet", scenes(9, 24, 31)))
    assert len(from_folder) == len(from_table) == 9
    assert torch.equal(from_folder.fitted(range(9), (16, 12)), from_table.fitted(range(9), (16, 12)))
    np.testing.assert_array_equal(np.asarray(from_folder.picture(7)), scenes(9, 24, 31)[7])


def test_fitting_cuts_the_centre():
    picture = scenes(1, 24, 31)[0]
    assert np.array_equal(np.asarray(fit(Image.fromarray(picture), (24, 31))), picture)
    square = Image.fromarray(picture[:, 3:28])  # 25 columns: the largest square of 24 starts half a pixel in
    assert fit(Image.fromarray(picture), (24, 24)).size == (24, 24)
    stripes = np.zeros((8, 24, 3), np.uint8)
    stripes[:, 8:16] = 255
    assert np.array_equal(np.asarray(fit(Image.fromarray(stripes), (8, 8))), stripes[:, 8:16])
    assert square.size == (25, 24)


def test_random_crops_stay_within_their_bounds():
    columns = np.broadcast_to(np.arange(0, 250, 5, dtype=np.uint8)[None, :, None], (50, 50, 3)).copy()
    picture, config = Image.fromarray(columns), PicturesConfig(min_crop=0.5, flip=False)
    spans = []
    for seed in range(60):
        cut = np.asarray(random_fit(picture, (20, 20), config, np.random.default_rng(seed)))[10, :, 0].astype(int)
        spans.append(cut[-1] - cut[0])
    assert 0.45 * 245 < min(spans) < 0.6 * 245 and 0.85 * 245 < max(spans) <= 245
    plain = random_fit(picture, (20, 20), PicturesConfig(min_crop=1, flip=False), np.random.default_rng(0))
    assert np.array_equal(np.asarray(plain), np.asarray(fit(picture, (20, 20))))
    flipped = {
        bool(np.asarray(random_fit(picture, (20, 20), PicturesConfig(), np.random.default_rng(s)))[0, 0, 0] > 120)
        for s in range(9)
    }
    assert flipped == {True, False}


def test_batches_are_a_function_of_seed_and_step_alone(folder):
    def first(num, start=0, workers=0, seed=3):
        config = PicturesConfig(workers=workers)
        found = training_batches(PictureSet(folder), np.arange(2, 9), (12, 10), 4, config, seed, start)
        return [next(found) for _ in range(num)]

    before = torch.get_rng_state()
    plain = first(5)
    assert plain[0].shape == (4, 12, 10, 3) and plain[0].dtype == torch.uint8
    assert all(torch.equal(a, b) for a, b in zip(plain, first(5, workers=2), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain[3:], first(2, start=3), strict=True))
    assert not torch.equal(plain[0], first(1, seed=4)[0])
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_picture_is_named(folder, tmp_path, workers):
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n nothing")
    found = training_batches(PictureSet(tmp_path), np.arange(1), (8, 8), 1, PicturesConfig(workers=workers), 0)
    with pytest.raises(InputError, match=r"^\S+x\.png: the 14 bytes are not a whole picture"):
        next(found)


def test_sources_that_hold_no_pictures_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"holds no pictures; expected files ending in \.png"):
        PictureSet(tmp_path)
    with pytest.raises(InputError, match=r"there is no .*missing; give a folder of pictures or a parquet table"):
        PictureSet(tmp_path / "missing")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(InputError, match=r"text is not a whole parquet file: .* Give a folder of pictures"):
        PictureSet(tmp_path / "text")
    pq.write_table(pa.table({"image": ["a"], "picture": [b"a"]}), tmp_path / "t.parquet")
    with pytest.raises(InputError, match="column 'image' holds string, expected encoded pictures"):
        PictureSet(tmp_path / "t.parquet")
    pq.write_table(pa.table({"picture": [b"a"]}), tmp_path / "u.parquet")
    with pytest.raises(InputError, match="has no column 'image'; it has picture"):
        PictureSet(tmp_path / "u.parquet")


# Figures


@pytest.mark.parametrize("size", [(6, 11), (23, 17)])
def test_ssim_agrees_with_torchmetrics(size):
    random = torch.Generator().manual_seed(0)
    theirs = to_images(torch.from_numpy(scenes(3, *size)))
    ours = (theirs + 0.2 * torch.randn(theirs.shape, generator=random)).clamp(0, 1)
    expected = structural_similarity_index_measure(ours, theirs, data_range=1.0, reduction="none")
    torch.testing.assert_close(ssim(ours, theirs), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ssim(theirs, theirs), torch.ones(3))
    with pytest.raises(ValueError, match="pictures of 5 x 12 pixels; SSIM needs 6 a side"):
        ssim(torch.zeros(1, 3, 5, 12), torch.zeros(1, 3, 5, 12))


def test_the_frechet_distance_agrees_with_the_matrix_root():
    random = np.random.default_rng(0)
    ours, theirs = random.normal(size=(40, 7)), random.normal(size=(31, 7)) * 2 + 0.3
    s1, s2 = np.cov(ours.T), np.cov(theirs.T)
    root = scipy.linalg.sqrtm(s1 @ s2).real
    expected = ((ours.mean(0) - theirs.mean(0)) ** 2).sum() + np.trace(s1 + s2 - 2 * root)
    assert frechet_distance(torch.from_numpy(ours), torch.from_numpy(theirs)) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(torch.from_numpy(ours), torch.from_numpy(ours)) == pytest.approx(0, abs=1e-6)
    one, two = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [5.0], [9.0]])
    assert frechet_distance(one, two) == pytest.approx((1 - 5) ** 2 + (math.sqrt(2) - 4) ** 2)


def test_the_feature_space_is_fixed_and_feels_blur_noise_and_blocks():
    torch.manual_seed(5)
    features = RandomFeatures()
    torch.manual_seed(6)
    again = RandomFeatures()
    assert all(torch.equal(a, b) for a, b in zip(features.buffers(), again.buffers(), strict=True))
    assert not list(features.parameters())
    # Written down once: these filters must not change between versions, or figures could not be compared.
    assert features.first.flatten()[:3].tolist() == pytest.approx([0.0342, -0.0360, 0.1743], abs=1e-4)

    pictures = scenes(60, seed=1)
    true = features(to_images(torch.from_numpy(pictures)))
    assert true.shape == (60, 64)

    def distance(change):
        changed = np.stack([np.asarray(change(Image.fromarray(picture))) for picture in pictures])
        return frechet_distance(features(to_images(torch.from_numpy(changed))), true)

    blur = [distance(lambda p, r=radius: p.filter(ImageFilter.GaussianBlur(r))) for radius in (0, 0.5, 1, 2)]
    blocks = [distance(lambda p, n=n: p.resize((n, n), Image.Resampling.BOX).resize((24, 24), 0)) for n in (24, 12, 6)]
    assert blur[0] == pytest.approx(0, abs=1e-6)
    assert sorted(blur) == blur and sorted(blocks) == blocks and blur[1] > 1e-4


class Rounding(torch.nn.Module):
    """Not a network: codes are the red channel in 8 levels, decoded as grey."""

    class config:
        codebook_size = 8
        image_size = (16, 12)

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def encode_images(self, images):
        return (images[:, 0] * 7).round().long()

    def decode_codes(self, codes):
        return (codes / 7)[:, None].expand(-1, 3, -1, -1) * 1.5 - 0.25  # leaves [0, 1], to be clamped


def test_figures_by_hand():
    grey = np.broadcast_to(np.array([0, 255, 255, 0], np.uint8)[:, None, None, None], (4, 16, 12, 3)).copy()
    grey[:, 8:] = 255 - grey[:, 8:]
    report = measure_reconstruction(Rounding(), torch.from_numpy(grey), batch_size=3)
    assert (report.psnr_db, report.ssim, report.lpips) == (math.inf, 1.0, None)
    assert report.frechet == pytest.approx(0, abs=1e-6)
    assert (report.codebook_usage, report.perplexity, report.dead_codes) == (0.25, pytest.approx(2.0), 6)
    assert (report.num_pictures, report.image_size, report.num_codes) == (4, (16, 12), 192)

    off = grey.copy()
    off[0, 0, 0] = [0, 51, 102]  # 0.2 and 0.4 away from the grey that is decoded
    report = measure_reconstruction(Rounding(), torch.from_numpy(off))
    assert report.psnr_db == pytest.approx(-10 * math.log10((0.2**2 + 0.4**2) / (4 * 16 * 12 * 3)))
    with pytest.raises(ValueError, match="1 pictures; a Fréchet distance needs at least 2"):
        measure_reconstruction(Rounding(), torch.from_numpy(off[:1]))


def test_the_batch_size_changes_nothing_and_lpips_is_averaged():
    pictures = torch.from_numpy(scenes(5, 16, 16))
    torch.manual_seed(0)
    lpips = LPIPS()
    for lin in lpips.lins:
        lin.data.fill_(1.0)
    one, other = (measure_reconstruction(Rounding(), pictures, lpips, batch_size=b) for b in (2, 5))
    assert one.lpips is not None and one.lpips > 0
    for name in ("psnr_db", "ssim", "lpips", "frechet"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-4)


# Comparison


def tiny(codes):
    return VQGANConfig(
        quantizer=codes, image_size=(12, 12), channels=32, encoder_multipliers=(1, 1), decoder_multipliers=(1, 1),
        encoder_attention_levels=(), decoder_attention_levels=(), num_res_blocks=1, latent_channels=8,
    )  # fmt: skip


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """A bare image tokenizer, and a folder that holds one."""
    folder = tmp_path_factory.mktemp("tokenizers")
    torch.manual_seed(0)
    save_image_tokenizer(VQGAN(tiny(FSQConfig(levels=(5, 5)))), folder / "fsq")
    save_image_tokenizer(VQGAN(tiny(QuantizerConfig(codebook_size=31, code_dim=5))), folder / "run" / "image_tokenizer")
    return folder / "fsq", folder / "run"


def test_several_tokenizers_in_one_table(tokenizers, folder, tmp_path):
    comparison = compare_tokenizers(tokenizers, folder, num=7, num_shown=3, command="smalti evaluate tokenizer ...")
    assert list(comparison.reports) == [str(path) for path in tokenizers]
    reports = list(comparison.reports.values())
    assert [report.codebook_size for report in reports] == [25, 31]
    assert all(report.num_pictures == 7 and report.num_codes == 36 for report in reports)
    table = comparison.table()
    assert [column.header for column in table.columns][:4] == ["image tokenizer", "pictures", "codes", "PSNR dB"]
    assert table.row_count == 2 and FEATURE_SPACE in str(table.caption)

    comparison.write(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "reconstruction.json").read_text())
    assert written["feature_space"] == FEATURE_SPACE and written["command"].startswith("smalti evaluate")
    read = written["image_tokenizers"][str(tokenizers[0])]
    assert read.pop("same_codes") == 1
    assert written["image_tokenizers"][str(tokenizers[1])]["same_codes"] is None  # other entries
    assert ReconstructionReport(**{**read, "image_size": tuple(read["image_size"])}) == reports[0]
    with pytest.raises(InputError, match=r"reconstruction.json exists already"):
        comparison.write(tmp_path / "out")
    comparison.write(tmp_path / "out", force=True)

    sheet = np.asarray(Image.open(tmp_path / "out" / "reconstructions.png"))
    zoom = 96 // 12
    assert sheet.shape == (3 * (14 + 96 + 2), 3 * (96 + 2), 3)
    first = PictureSet(folder).fitted([0], (12, 12))[0].numpy()
    assert np.array_equal(sheet[14 : 14 + 96 : zoom, 0:96:zoom], first)


def test_another_picture_size_can_be_asked_for(tokenizers, folder):
    comparison = compare_tokenizers(tokenizers[:1], folder, image_size=(16, 20))
    (report,) = comparison.reports.values()
    assert (report.image_size, report.num_codes, report.num_pictures) == ((16, 20), 80, 9)


def test_what_cannot_be_compared_is_refused(tokenizers, folder, tmp_path):
    assert find_image_tokenizer(tokenizers[1]) == tokenizers[1] / "image_tokenizer"
    with pytest.raises(InputError, match=r"holds no image tokenizer; give a folder with config\.json"):
        compare_tokenizers([tmp_path], folder)
    with pytest.raises(InputError, match="no image tokenizer is given"):
        compare_tokenizers([], folder)
