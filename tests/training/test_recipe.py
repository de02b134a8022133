"""Recipes are refused with the name of the wrong field."""

from pathlib import Path

import pytest

from twotower_spec.errors import ArgumentError
from twotower_spec.training.recipe import load_recipe

MINIATURE = Path(__file__).with_name("miniature.toml")


def changed(tmp_path: Path, old: str, new: str) -> Path:
    text = MINIATURE.read_text()
    assert old in text
    file = tmp_path / "recipe.toml"
    file.write_text(text.replace(old, new, 1))
    return file


def test_the_recipe_of_the_trio_and_the_miniature_can_be_read() -> None:
    trio, miniature = load_recipe(None), load_recipe(MINIATURE)
    assert load_recipe(Path("trio-gpu")).two_tower == trio.two_tower
    assert trio.two_tower_config(vocab_size=2048).layer_kinds.count("M") >= 1
    assert miniature.denoiser.masking.block_sizes == (8, 4)
    assert miniature.verifier is not None and miniature.verifier.model.head_dim == 32


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps = 60", "stepz = 60", "no field 'stepz'; allowed are adam_lr, "),
        ("steps = 60", 'steps = "many"', "training.steps is 'many'; give a value of type int"),
        ("steps = 60", "steps = -1", "steps is -1; give a number that is not negative"),
        ("head_dim = 32\n\n[verifier.training]", "\n[verifier.training]", "verifier.model lacks head_dim; add it"),
        ('hybrid_override_pattern = "M*E"', 'hybrid_override_pattern = "MXE"', "two_tower of the recipe is refused"),
        ("[corpus]", "[corpus", "cannot be read"),
        ("checkpoint_every = 20", "checkpoint_every = 0", "verifier.training: checkpoint_every is 0; give at least 1"),
        ("sources = { maths = 0.5, python = 0.5 }", "sources = {}", "sources is {}; give a weight"),
        ("sources = { maths = 0.5, python = 0.5 }", 'sources = { maths = "x" }', "sources is {'maths': 'x'}"),
        ("sources = { maths = 0.5, python = 0.5 }", 'sources = ["maths"]', "give a table"),
        ("block_sizes = [8, 4]", "block_sizes = []", r"block_sizes is \(\); give whole numbers"),
        ("block_sizes = [8, 4]", "block_sizes = [64]", "sequence_length is 64; give two blocks of 64"),
        ("first_given = 0.3", "first_given = 0.9", "all_masked . first_given is 1.1"),
        ("position_decay = 0.9", "position_decay = 0", "position_decay is 0.0; give a number above 0"),
        ("documents = { maths = 12, python = 12 }", "documents = { maths = 1.5 }", "documents is {'maths': 1.5}"),
        ("[two_tower]", "[two_tower]\nmask_token_id = 5", "leave these out"),
        (
            "[denoiser.masking]\nblock_sizes = [8, 4]",
            "[denoiser.masking]\nblock_sizes = 8",
            "block_sizes is 8; give a list",
        ),
    ],
)
def test_a_bad_field_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        load_recipe(changed(tmp_path, old, new))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"none\.toml cannot be read"):
        load_recipe(tmp_path / "none.toml")
