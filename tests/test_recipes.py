"""Recipes: those that ship are sound, changes reach the place they name, and errors say what to mend."""

from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from smalti.errors import InputError
from smalti.models.config import PRESETS, TransformerConfig
from smalti.recipes import Recipe, load_recipe, shipped_recipes
from smalti.recipes.load import _keys
from smalti.training.token_model import TrainConfig


def test_the_recipes_that_ship_can_be_loaded_and_run_into_folders_of_their_own():
    recipes = {name: load_recipe(name) for name in shipped_recipes()}
    assert {"demo", "digits", "digits-best"} <= set(recipes)
    assert len({recipe.output for recipe in recipes.values()}) == len(recipes)
    for recipe in recipes.values():
        assert recipe.description and recipe.expects


def test_the_digits_recipe_is_the_homeworks():
    recipe = load_recipe("digits")
    model, train = recipe.model, recipe.train
    assert (model.num_layers, model.d_model, model.num_heads, model.d_ff, model.max_length) == (4, 128, 4, 512, 58)
    assert (model.norm, model.feed_forward, model.positions, model.dropout) == ("layer", "gelu", "learned", 0.0)
    assert (train.num_epochs, train.batch_size, train.learning_rate) == (30, 32, 1e-3)
    assert (train.schedule, train.warmup_steps, train.weight_decay, train.betas) == ("constant", 0, 0.0, (0.9, 0.999))
    layout = recipe.layout.make(codebook_size=1024, text_vocab_size=31)
    assert layout.vocabulary.size == 1024 + 31 + 3 and layout.is_fixed
    assert [str(order) for order in layout.orders.values()] == [
        "<bos> <end of image> text{6} <end of text> image{49}",
        "<bos> <end of text> image{49} <end of image> text{6}",
    ]
    assert [order.weight for order in layout.orders.values()] == [1.0, 1.0]


def test_the_best_recipe_differs_in_training_alone():
    plain, best = load_recipe("digits"), load_recipe("digits-best")
    assert (plain.data, plain.image_tokenizer, plain.layout) == (best.data, best.image_tokenizer, best.layout)
    sizes = [(r.model.num_layers, r.model.d_model, r.model.num_heads, r.model.d_ff) for r in (plain, best)]
    assert sizes[0] == sizes[1]


def test_every_setting_of_the_training_can_be_changed():
    names = set(_keys(Recipe))
    assert {f"train.{field.name}" for field in fields(TrainConfig)} <= names
    assert "model.max_length" not in names


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("train.learning_rate=2e-3", lambda r: r.train.learning_rate == 0.002),
        ("train.final_share=.5E-3", lambda r: r.train.final_share == 0.0005),
        ("num_micro_batches=4", lambda r: r.train.num_micro_batches == 4),
        ("train.betas=[0.9, 0.95]", lambda r: r.train.betas == (0.9, 0.95)),
        ("full_softmax=true", lambda r: r.train.full_softmax is True),
        ("output=elsewhere/run=1", lambda r: r.output == Path("elsewhere/run=1")),
        ("data.path=/data/mnist", lambda r: r.data.path == Path("/data/mnist")),
        ("codebook_size=512", lambda r: r.image_tokenizer.model.codebook_size == 512),
        ("sample.picture.temperature=0.123", lambda r: r.sample.picture.temperature == 0.123),
        ("sample.caption={top_k: 3}", lambda r: (r.sample.caption.top_k, r.sample.caption.temperature) == (3, 1.0)),
        (
            "layout.orders.image to text=['<bos> <end of text> image{49} <end of image> text{6}', 3.5]",
            lambda r: r.layout.orders["image to text"][1] == 3.5,
        ),
    ],
)
def test_a_change_reaches_its_place(override, read):
    assert not read(load_recipe("digits"))
    assert read(load_recipe("digits", [override]))


def test_later_changes_win_and_null_takes_a_setting_back():
    recipe = load_recipe(
        "digits", ["train.batch_size=8", "num_epochs=null", "train.num_steps=10", "train.batch_size=16"]
    )
    assert (recipe.train.num_epochs, recipe.train.num_steps, recipe.train.batch_size) == (None, 10, 16)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["foo"], "'foo' is no setting; write key=value, for example train.learning_rate=1e-3."),
        (["=3"], "'=3' is no setting; write key=value, for example train.learning_rate=1e-3."),
        (["lerning_rate=2"], "there is no setting lerning_rate; did you mean train.learning_rate?"),
        (["train.epochs=3"], "there is no setting train.epochs; did you mean train.num_epochs?"),
        (
            ["seed=3"],
            "several settings are named seed; write data.colouring.seed or image_tokenizer.train.seed or train.se",
        ),
        (["data.zzzz=3"], "there is no setting data.zzzz; there are data.source, data.path"),
        (["train.learning_rate=fast"], "recipe digits: train.learning_rate is 'fast'; expected a number."),
        (["train.learning_rate='1e-3'"], "recipe digits: train.learning_rate is '1e-3'; expected a number."),
        (["num_layers=true"], "recipe digits: model.num_layers is True; expected a whole number."),
        (["num_layers=2.5"], "recipe digits: model.num_layers is 2.5; expected a whole number"),
        (["train.betas=3"], "recipe digits: train.betas is 3; expected a list."),
        (["train.betas=[0.9]"], "recipe digits: train.betas.1 is missing; add it."),
        (["train=3"], "recipe digits: train is 3; expected a section"),
        (
            ["train.seed=[1"],
            "'train.seed=[1', line 1: not YAML: ",
        ),
        (["train.learning_rate=-1"], "recipe digits: train: learning_rate is -1.0; it must be more than 0."),
        (
            ["train.num_steps=3"],
            "recipe digits: train: num_epochs is 30.0 and num_steps 3; give one of them and not",
        ),
        (["d_model=130"], "recipe digits: model: d_model 130 is not divisible by num_heads 4."),
        (["data.source=cifar"], "recipe digits: data.source is 'cifar'; expected 'scikit-learn', 'mnist' or 'pickle'."),
        (["data.path=null"], 'recipe digits: data: path is None, and source "mnist" needs a path.'),
        (["data.source=scikit-learn"], 'data: path is data/mnist, and source "scikit-learn" has no path.'),
        (["patch_size=2"], "has image{49}, but the image tokenizer gives 14 × 14 codes; write image{196}"),
        (["layout.orders.a=image{49"], "recipe digits: layout.orders: cannot read the layout at character 0"),
        (["layout.orders.a=<oops> image{49}"], "no special '<oops>' in the vocabulary; there are <bos>"),
        (["layout.orders={}"], "recipe digits: layout.orders"),
    ],
)
def test_a_wrong_setting_is_named_with_its_mend_in_one_line(overrides, message):
    with pytest.raises(InputError) as error:
        load_recipe("digits", overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_all_that_is_wrong_is_said_at_once():
    overrides = ["lerning_rate=2", "train=3", "train.seed=1", "num_layers=x", "data.source=cifar", "codebook_size=-1"]
    with pytest.raises(InputError) as error:
        load_recipe("digits", overrides)
    assert [line.strip() for line in str(error.value).splitlines()] == [
        "6 settings are not as expected:",
        "there is no setting lerning_rate; did you mean train.learning_rate?",
        "'train.seed=1': the recipe's train is not a section but 3.",
        "recipe digits: data.source is 'cifar'; expected 'scikit-learn', 'mnist' or 'pickle'.",
        "recipe digits: image_tokenizer.model.quantizer: codebook_size is -1; it must be at least 1.",
        "recipe digits: model.num_layers is 'x'; expected a whole number.",
        "recipe digits: train is 3; expected a section.",
    ]
    with pytest.raises(InputError, match=r"train: batch_size is 0; it must be more than 0\. betas is 1\.0; expected"):
        load_recipe("digits", ["train.batch_size=0", "train.betas=[0.9, 1.0]"])


def test_old_names_of_settings_are_read_everywhere(tmp_path):
    """In recipes, on the command line by their place or alone, and in the folders of runs."""
    content = yaml.safe_load(shipped_recipes()["vqgan"].read_text())
    content["train"] = {"steps": 7, "weight_ema_decay": 0.5, "gradient_clip": 2.0, "save_every": 3}
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(content))
    overrides = ["train.steps=7", "weight_ema_decay=0.5", "gradient_clip=2", "train.save_every=3"]
    for train in (
        load_recipe(tmp_path / "old.yaml").train,
        load_recipe("vqgan", overrides).train,
        load_recipe(
            "digits", [f"image_tokenizer.{overrides[0]}", *overrides[1:3], "save_every=3"]
        ).image_tokenizer.train,
    ):
        assert (train.num_steps, train.ema_decay, train.max_grad_norm, train.checkpoint_every) == (7, 0.5, 2.0, 3)
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(content | {"train": {"steps": 7, "num_steps": 7}}))
    with pytest.raises(InputError, match=r"old.yaml: train: steps is the old name of num_steps; give one of them"):
        load_recipe(tmp_path / "old.yaml")


def test_a_trained_image_tokenizer_may_have_another_grid():
    overrides = ["patch_size=2", "image_tokenizer.path=elsewhere/image_tokenizer"]
    assert load_recipe("digits", overrides).image_tokenizer.path == Path("elsewhere/image_tokenizer")


def test_an_unknown_recipe_lists_the_known():
    with pytest.raises(
        InputError, match=r"no recipe 'digit'; there are .*demo, .*digits.* path of a .yaml file. Did you"
    ):
        load_recipe("digit")


def written(folder, change=lambda content: None, text=""):
    content = yaml.safe_load(shipped_recipes()["digits"].read_text())
    content["train"]["learning_rate"] = 0.25
    change(content)
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(content) + text)
    return path


def test_a_recipe_of_ones_own_is_read_from_its_file(tmp_path):
    assert load_recipe(written(tmp_path)).train.learning_rate == 0.25


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(trian={}), "there is no setting trian; did you mean"),
        (lambda c: c["train"].update(lr=1), "there is no setting train.lr; "),
        (lambda c: c.pop("output"), "output is missing; add it."),
        (lambda c: c.update(model={"num_layers": 4, "num_heads": 4, "d_ff": 9}), "model.d_model is missing; add it."),
        (lambda c: c["model"].update(max_length=99), "model.max_length follows from the layout; leave it out."),
        (lambda c: c["image_tokenizer"]["model"]["quantizer"].update(size=3), "no setting image_tokenizer.model.quant"),
        (lambda c: c["image_tokenizer"]["model"]["quantizer"].update(code_dim="x"), "quantizer.code_dim is 'x'; expec"),
    ],
)
def test_a_wrong_recipe_is_named_with_its_mend(tmp_path, change, message):
    with pytest.raises(InputError) as error:
        load_recipe(written(tmp_path, change))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_yaml_is_named_with_the_line(tmp_path):
    path = written(tmp_path, text="train: {}\n")
    with pytest.raises(InputError, match=r"mine.yaml, line 1: not YAML: 'train' is given twice"):
        load_recipe(path)
    path.write_text("data: [1\nmodel: 3\n")
    with pytest.raises(InputError, match=r"mine.yaml, line 2: not YAML"):
        load_recipe(path)
    path.write_text("just words")
    with pytest.raises(InputError, match=r"mine.yaml holds text, expected a mapping of names to values"):
        load_recipe(path)


def test_a_preset_gives_the_model_and_other_fields_change_it():
    model = load_recipe("digits", ["data.path=mnist", "model.preset=digits", "model.dropout=0.1"]).model
    assert model == TransformerConfig(max_length=58, dropout=0.1, **PRESETS["digits"])
    short = load_recipe("cc3m", ["model=llama-60m", "dropout=0.2"]).model
    assert short == TransformerConfig(max_length=98, dropout=0.2, **PRESETS["llama-60m"])
    with pytest.raises(InputError, match=r"model.preset 'large' is unknown; choose one of digits, llamagen-b"):
        load_recipe("digits", ["data.path=mnist", "model.preset=large"])
