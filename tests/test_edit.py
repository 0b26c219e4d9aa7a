"""Parts of a picture drawn anew: what is kept stays, what is drawn is what the model draws behind it."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_generate import DIGITS, teacher_forced, tiny_model
from tiny_bundle import tiny_bpe_pipeline, tiny_pipeline

from smalti.cli import app as cli
from smalti.engine.engine import Engine
from smalti.engine.resampling import ResampleConfig
from smalti.engine.sampling import SampleConfig
from smalti.errors import InputError
from smalti.image_files import RECEIPT, read_receipt, save_picture
from smalti.sequences.request import Request
from smalti.tasks.edit import codes_of, edit, edit_codes, is_behind, pixel_distance, reach, read_mask, redrawn_cells
from smalti.tasks.replay import replay

CAPTION = "dark green eight on bright cyan"


def cells(*numbers: int, grid=(7, 7)) -> torch.Tensor:
    found = torch.zeros(grid, dtype=torch.bool)
    found.view(-1)[list(numbers)] = True
    return found


@pytest.mark.parametrize("executor", ["eager", "packed"])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_what_is_drawn_between_kept_tokens_has_the_models_own_probability(executor, scale):
    """By the teacher-forced pass over the whole sequence: the log-prob of each drawn token, and none of a kept one."""
    model, text, image = tiny_model(DIGITS), torch.tensor([2, 0, 5]), torch.tensor([12, 3])
    null = Request(order="image to text", given={"image": image})
    request = Request(
        order="text to image", given={"text": text, "image": image}, kept={"image": {3: 7}}, seed=3, null=null
    )
    engine = Engine(model, DIGITS, capacity=2, executor=executor)
    tickets = [engine.submit(request, SampleConfig(guidance_scale=scale)) for _ in range(2)]
    engine.run()
    first, second = (engine.take(ticket) for ticket in tickets)
    assert torch.equal(first.token_ids, second.token_ids)
    assert first.spans["image"][[0, 1, 3]].tolist() == [12, 3, 7]
    expected = teacher_forced(model, DIGITS, first)
    drawn = torch.tensor([len(first.token_ids) - 3, len(first.token_ids) - 1])
    torch.testing.assert_close(first.log_probs[drawn], expected[drawn].float(), atol=1e-5, rtol=1e-5)
    assert first.log_probs[-2] == 0


def test_kept_tokens_that_cannot_be_are_explained():
    text = torch.tensor([2, 0, 5])
    for kept, match in (
        ({"image": {5: 0}}, "positions to 5"),
        ({"image": {2: 13}}, r"outside 0\.\.12"),
        ({"image": {0: 1}}, "next to what is given"),
    ):
        with pytest.raises(ValueError, match=match):
            Engine(tiny_model(DIGITS), DIGITS).submit(Request(order="text to image", given={"text": text}, kept=kept))


@pytest.mark.parametrize("pipe", [tiny_pipeline(), tiny_bpe_pipeline()], ids=["digits", "captions"])
def test_edited_pictures_keep_their_cells_and_are_drawn_again_from_their_receipts(pipe, tmp_path):
    caption = CAPTION if pipe.name == "tiny" else "a purple dog"
    [picture] = pipe.generate(caption, seed=1)
    codes, redrawn = codes_of(pipe, picture), cells(8, 9, 30)
    assert codes.flatten().tolist() == json.loads(picture.info[RECEIPT])["codes"]
    drawn = edit(pipe, picture, redrawn, caption, seed=5, n=2, best_of=2, guidance_scale=2.0)
    assert len({one.info[RECEIPT] for one in drawn}) == 2
    pipe.save(tmp_path / "bundle")
    for i, one in enumerate(drawn):
        path = tmp_path / f"{i}.png"
        save_picture(one, path)
        receipt = read_receipt(path)
        found = torch.tensor(receipt["codes"]).view(7, 7)
        assert torch.equal(found[~redrawn], codes[~redrawn])
        assert receipt["redrawn"] == [8, 9, 30] and receipt["seed"] - 5 in range(2 * i, 2 * i + 2)
        again = edit_codes(pipe, codes, redrawn, caption, seed=receipt["seed"], guidance_scale=2.0)
        assert torch.equal(again[0], found)
        assert replay(path, tmp_path / "bundle").difference is None


def test_all_cells_drawn_is_a_picture_from_nothing():
    pipe = tiny_pipeline()
    codes = edit_codes(pipe, torch.zeros(7, 7, dtype=torch.long), cells(*range(49)), CAPTION, seed=4)
    assert torch.equal(codes, pipe.generate_codes(CAPTION, seed=4))


def test_a_receipt_is_believed_only_where_the_pixels_agree():
    pipe = tiny_pipeline()
    first, second = pipe.generate(CAPTION, seed=1, n=2)
    first.info[RECEIPT] = second.info[RECEIPT]
    assert torch.equal(codes_of(pipe, first), pipe.encode([first])[0])


def test_a_mask_says_which_cells_are_drawn():
    mask = Image.new("L", (28, 28), 255)
    mask.putpixel((27, 4), 254)
    mask.putpixel((0, 27), 0)
    assert redrawn_cells(mask, (7, 7)).flatten().nonzero().flatten().tolist() == [13, 42]
    with pytest.raises(InputError, match="as large as the picture"):
        redrawn_cells(Image.new("L", (27, 28)), (7, 7))


def test_nothing_to_draw_is_said():
    with pytest.raises(InputError, match="nothing to draw"):
        edit_codes(tiny_pipeline(), torch.zeros(7, 7, dtype=torch.long), cells(), CAPTION)


def painted(seed: int) -> Image.Image:
    """A picture that no code stands for: noise of the levels that the bundle's pictures have."""
    levels = torch.randint(0, 4, (28, 28, 3), generator=torch.Generator().manual_seed(seed)) * 85
    return Image.fromarray(levels.byte().numpy()).resize((56, 56), Image.Resampling.NEAREST)


def test_resampled_edits_keep_codes_and_far_pixels_and_are_drawn_again(tmp_path):
    pipe, picture, redrawn = tiny_pipeline(), painted(0), cells(8, 9, 30)
    resampling = ResampleConfig(num_particles=3, num_sweeps=1)
    how = {"seed": 5, "guidance_scale": 2.0, "resampling": resampling, "blended": True}
    drawn = edit(pipe, picture, redrawn, CAPTION, n=2, **how)
    codes = codes_of(pipe, picture)
    assert len({one.info[RECEIPT] for one in drawn}) == 2
    pipe.save(tmp_path / "bundle")
    for i, one in enumerate(drawn):
        receipt = json.loads(one.info[RECEIPT])
        found = torch.tensor(receipt["codes"]).view(7, 7)
        assert torch.equal(found[~redrawn], codes[~redrawn]) and receipt["seed"] == 5 + i
        assert receipt["resampling"] == {"num_particles": 3, "num_sweeps": 1}
        alone = edit(pipe, picture, redrawn, CAPTION, **how | {"seed": 5 + i})[0]
        assert json.loads(alone.info[RECEIPT])["codes"] == receipt["codes"]
        path = tmp_path / f"{i}.png"
        save_picture(one, path)
        assert replay(path, tmp_path / "bundle").difference is None
        wrong = one.copy()
        wrong.putpixel((2 * 4 + 1, 2 * 4 + 1), (1, 2, 3))  # in cell 8
        wrong.info = one.info
        save_picture(wrong, path, force=True)
        assert "pixels differ" in str(replay(path, tmp_path / "bundle").difference)


def test_blended_pixels_are_the_given_ones_beyond_the_reach_and_the_drawn_ones_inside():
    pipe, picture, redrawn = tiny_pipeline(), painted(1), cells(0)
    [drawn] = edit(pipe, picture, redrawn, CAPTION, seed=1, blended=True, scale=1, best_of=1)
    receipt, given = json.loads(drawn.info[RECEIPT]), np.asarray(picture)[::2, ::2]
    distance = pixel_distance(redrawn, pipe.pictures).numpy()
    assert distance[3, 3] == 0 and distance[4, 0] == 1 and distance[5, 9] == 6
    [whole] = pipe.decode(torch.tensor(receipt["codes"]).view(1, 7, 7), scale=1)
    far = distance > receipt["blended"]
    assert far.sum() > 0 and (np.asarray(drawn)[far] == given[far]).all()
    assert (np.asarray(drawn)[distance == 0] == np.asarray(whole)[distance == 0]).all()
    assert set(np.unique(np.asarray(drawn)).tolist()) <= {0, 85, 170, 255}


def test_the_reach_of_a_cell_is_as_far_as_its_code_changes_pixels():
    """Of a decoder whose pixels each depend on the codes at most 6 pixels away, all of them equally."""
    pipe = tiny_pipeline()

    def decode_codes(codes):
        pixels = codes.float().repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].expand(-1, 3, -1, -1)
        return torch.nn.functional.max_pool2d(pixels / 100, 13, stride=1, padding=6)

    pipe.image_tokenizer.decode_codes = decode_codes
    codes = torch.zeros(7, 7, dtype=torch.long)
    assert reach(pipe, codes, cells(24)) == 6
    assert reach(pipe, codes, cells(16, 24, 32)) == 6


def test_what_stands_behind_all_that_is_kept_is_drawn_as_the_model_draws():
    pipe, redrawn = tiny_pipeline(), cells(*range(20, 49))
    assert is_behind(redrawn) and not is_behind(cells(20, 22)) and is_behind(cells(48))
    [picture] = pipe.generate(CAPTION, seed=1)
    [plain] = edit(pipe, picture, redrawn, CAPTION, seed=3)
    [asked] = edit(pipe, picture, redrawn, CAPTION, seed=3, resampling=ResampleConfig())
    assert plain.info[RECEIPT] == asked.info[RECEIPT]


def test_the_command_edits_and_refuses_other_masks(tmp_path, capsys):
    pipe = tiny_pipeline()
    pipe.save(tmp_path / "bundle")
    painted(2).save(tmp_path / "picture.png")
    mask = Image.new("L", (56, 56))
    mask.paste(255, (16, 8, 30, 14))
    mask.save(tmp_path / "mask.png")
    Image.new("L", (56, 50), 255).save(tmp_path / "other.png")
    Image.new("L", (56, 56)).save(tmp_path / "nothing.png")

    def run(name: str, *more: str) -> int:
        files = [str(tmp_path / "picture.png"), "--mask", str(tmp_path / name), CAPTION]
        return cli.run(["edit", *files, "-o", str(tmp_path / "out.png"), "--bundle", str(tmp_path / "bundle"), *more])

    assert run("mask.png", "--particles", "2", "-n", "2", "--seed", "4") == 0, capsys.readouterr().err
    said = capsys.readouterr()
    assert "drawing: 42 steps" in said.err and "out-2.png" in said.out
    receipt = read_receipt(tmp_path / "out-1.png")
    assert receipt["redrawn"] == [9, 10] and receipt["seed"] == 4  # the mask touches cells 2 and 3 of row 1
    for name, more, match in (
        ("other.png", [], "other.png has 56×50 pixels, the picture"),
        ("nothing.png", [], "has no bright part: there is nothing to draw"),
        ("mask.png", ["--temperature", "0"], "temperature 0 draws one and the same"),
        ("mask.png", ["--particles", "0"], "num_particles is 0; expected 2"),
        ("mask.png", ["-n", "2"], "exists"),
    ):
        assert run(name, *more) == 2
        assert match in capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()


def test_a_mask_is_read_by_its_alpha_channel_or_by_what_is_bright(tmp_path):
    Image.new("RGB", (28, 28)).save(tmp_path / "picture.png")
    alpha = Image.new("RGBA", (28, 28), (255, 255, 255, 255))
    alpha.putpixel((5, 0), (255, 255, 255, 0))
    bright = Image.new("RGB", (28, 28))
    bright.putpixel((5, 0), (255, 255, 255))
    for name, mask in (("alpha.png", alpha), ("bright.png", bright)):
        mask.save(tmp_path / name)
        redrawn = read_mask(tmp_path / name, tmp_path / "picture.png", (7, 7))
        assert redrawn.flatten().nonzero().flatten().tolist() == [1]


def test_candidates_and_particles_are_two_ways():
    pipe = tiny_pipeline()
    with pytest.raises(InputError, match="leave one of them out"):
        edit(pipe, painted(0), cells(3), CAPTION, best_of=2, resampling=ResampleConfig())
