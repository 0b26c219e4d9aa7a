"""Parts of a picture drawn anew: what is kept stays, what is drawn is what the model draws behind it."""

import json

import pytest
import torch
from PIL import Image
from test_generate import DIGITS, teacher_forced, tiny_model
from tiny_bundle import tiny_bpe_pipeline, tiny_pipeline

from smalti.engine.engine import Engine
from smalti.engine.sampling import SampleConfig
from smalti.errors import InputError
from smalti.image_files import RECEIPT, read_receipt, save_picture
from smalti.sequences.request import Request
from smalti.tasks.edit import codes_of, edit, edit_codes, redrawn_cells
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
