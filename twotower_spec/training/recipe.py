"""Recipes: everything that determines the result of a training, read from one TOML file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from twotower_spec.config import TwoTowerConfig
from twotower_spec.errors import ArgumentError, ConfigError
from twotower_spec.reading import read_toml

Section = TypeVar("Section")

# Fields of config.json that a recipe does not give.
SET_BY_TRAINING = {
    "num_hidden_layers", "vocab_size", "mask_token_id", "pad_token_id", "bos_token_id", "eos_token_id", "torch_dtype",
}  # fmt: skip
BUNDLED_RECIPES = ("trio", "trio-gpu")


def check(allowed: bool, where: str, value: object, remedy: str) -> None:
    """Refuses a value of a recipe.

    Raises:
        ArgumentError: it is not allowed.
    """
    if not allowed:
        raise ArgumentError(f"{where} is {value!r}; {remedy}")


@dataclass(frozen=True)
class CorpusConfig:
    """The corpus of the bundled trio.

    Attributes:
        maths, python: generated documents per domain.
        arithmetic: documents of calculations.
        gsm8k, standard_library: whether these real texts are included.
    """

    maths: int = 40000
    python: int = 40000
    arithmetic: int = 0
    gsm8k: bool = True
    standard_library: bool = True


@dataclass(frozen=True)
class TokenizerConfig:
    """Byte-level BPE tokenizer.

    Attributes:
        vocab_size: special tokens and bytes included.
    """

    vocab_size: int = 2048


@dataclass(frozen=True)
class LanguageModelConfig:
    """Geometry of a Qwen3-style model, under the field names of its config.json."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int


@dataclass(frozen=True)
class TrainingConfig:
    """Schedule of one training run.

    Attributes:
        steps: optimiser steps.
        batch_size: rows per step.
        sequence_length: tokens per row.
        sources: weight of every text source in a batch.
        muon_lr, adam_lr: peak learning rates of hidden matrices and of everything else.
        weight_decay: of the hidden matrices.
        warmup, decay: shares of the steps.
        clip_norm: largest norm of the gradients.
        checkpoint_every: steps between checkpoints.
        compile: let torch.compile fuse the step; worth its start-up on a GPU.
    """

    steps: int
    sources: Mapping[str, float]
    batch_size: int = 4
    sequence_length: int = 512
    muon_lr: float = 0.02
    adam_lr: float = 2e-3
    weight_decay: float = 0.1
    warmup: float = 0.03
    decay: float = 0.35
    clip_norm: float = 1.0
    checkpoint_every: int = 100
    compile: bool = False

    def __post_init__(self) -> None:
        """Checks every value."""
        for name in ("steps", "batch_size", "sequence_length", "checkpoint_every"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "give at least 1")
        for name in ("muon_lr", "adam_lr", "clip_norm"):
            check(0 < getattr(self, name) < math.inf, name, getattr(self, name), "give a number above 0")
        for name in ("warmup", "decay"):
            check(0 <= getattr(self, name) <= 1, name, getattr(self, name), "give a share between 0 and 1")
        weights = self.sources.values()
        usable = all(isinstance(w, (int, float)) and 0 <= w < math.inf for w in weights) and sum(weights) > 0
        check(usable, "sources", dict(self.sources), "give a weight for every text source, one above 0 at least")


@dataclass(frozen=True)
class LanguageModelRecipe:
    """A Qwen3-style model and its training."""

    model: LanguageModelConfig
    training: TrainingConfig


@dataclass(frozen=True)
class MaskingConfig:
    """Masking of blocks in training.

    Attributes:
        block_sizes: steps take them in turn.
        all_masked: share of blocks that are masked as a whole.
        first_given: share of blocks that are masked but for the first token, which in drafting the context tower gives.
        position_decay: weight of a position relative to the one before it in those two kinds of blocks, since drafts
            are accepted from the left.
    """

    block_sizes: tuple[int, ...] = (16,)
    all_masked: float = 0.15
    first_given: float = 0.15
    position_decay: float = 1.0

    def __post_init__(self) -> None:
        """Checks every value."""
        usable = bool(self.block_sizes) and all(type(size) is int and size >= 2 for size in self.block_sizes)
        check(usable, "block_sizes", self.block_sizes, "give whole numbers of 2 or more, [16] for one")
        share = self.all_masked + self.first_given
        check(0 <= share <= 1, "all_masked + first_given", share, "give shares that sum to 1 at most")
        check(0 < self.position_decay <= 1, "position_decay", self.position_decay, "give a number above 0, at most 1")


@dataclass(frozen=True)
class DenoiserRecipe:
    """Training of the denoiser, whose geometry is the context tower's."""

    training: TrainingConfig
    masking: MaskingConfig = field(default_factory=MaskingConfig)

    def __post_init__(self) -> None:
        """Checks that a sequence holds a block that has context."""
        length, block = self.training.sequence_length, max(self.masking.block_sizes)
        check(length >= 2 * block, "denoiser.training.sequence_length", length, f"give two blocks of {block} or more")


@dataclass(frozen=True)
class SamplingConfig:
    """Text sampled from the verifier.

    Attributes:
        documents: per text source, how many beginnings are continued.
        max_new_tokens: most tokens of a continuation.
        temperature: of the continuations that are not greedy.
        greedy: share of greedy continuations.
        batch_size: continuations made together.
        prompt_tokens: how much of a document of real text is given.
    """

    documents: Mapping[str, int]
    max_new_tokens: int = 160
    temperature: float = 0.7
    greedy: float = 0.5
    batch_size: int = 64
    prompt_tokens: int = 48

    def __post_init__(self) -> None:
        """Checks every value."""
        for name in ("max_new_tokens", "batch_size", "prompt_tokens"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "give at least 1")
        counts = self.documents.values()
        usable = all(type(count) is int and count >= 0 for count in counts) and sum(counts) > 0
        check(usable, "documents", dict(self.documents), "give a number of documents for every text source")
        check(0 <= self.greedy <= 1, "greedy", self.greedy, "give a share between 0 and 1")
        check(0 < self.temperature < math.inf, "temperature", self.temperature, "give a number above 0")


@dataclass(frozen=True)
class DistillRecipe:
    """Sampling from the verifier, and further training of the context tower on these samples."""

    sampling: SamplingConfig
    training: TrainingConfig


@dataclass(frozen=True)
class Recipe:
    """Recipe of a whole trio.

    Attributes:
        two_tower: geometry of both towers, fields of config.json; `vocab_size` comes from the tokenizer.
        context: training of the context tower.
        verifier: None where the user brings one.
        draft: the AR draft model, None to leave it out.
        distill: None to train on the corpus alone.
        seed: of all randomness.
    """

    two_tower: Mapping[str, Any]
    context: TrainingConfig
    denoiser: DenoiserRecipe
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    verifier: LanguageModelRecipe | None = None
    draft: LanguageModelRecipe | None = None
    distill: DistillRecipe | None = None
    seed: int = 0

    def two_tower_config(self, **tokens: Any) -> TwoTowerConfig:
        """Makes the towers' configuration.

        Args:
            tokens: `vocab_size` and the ids of special tokens.

        Raises:
            ConfigError: the recipe's geometry is refused.
        """
        pattern = str(self.two_tower.get("hybrid_override_pattern", ""))
        fields = {**self.two_tower, "num_hidden_layers": len(pattern), "torch_dtype": "bfloat16"}
        return TwoTowerConfig(**fields, **tokens)


def load_recipe(path: Path | None) -> Recipe:
    """Reads a recipe.

    Args:
        path: a TOML file, or the name of a bundled recipe (`trio`, `trio-gpu`); None for `trio`.

    Raises:
        ArgumentError: the file cannot be read, or a field is unknown, missing or of the wrong type.
    """
    path = path or Path("trio")
    remedy = f"give a TOML file, or the name of a bundled recipe: {', '.join(BUNDLED_RECIPES)}"
    if str(path) in BUNDLED_RECIPES:
        with as_file(files("twotower_spec.training") / "data" / f"{path}.toml") as bundled:
            table = read_toml(bundled)
    else:
        table = read_toml(path, "recipe", remedy)
    recipe = _section(Recipe, table, "recipe")
    given = sorted(SET_BY_TRAINING & set(recipe.two_tower))
    check(
        not given, "two_tower of the recipe", given, "leave these out: they follow from the tokenizer and the pattern"
    )
    try:
        recipe.two_tower_config(vocab_size=recipe.tokenizer.vocab_size)
    except (ConfigError, TypeError) as error:
        raise ArgumentError(f"two_tower of the recipe is refused: {error}; correct its fields") from error
    return recipe


def _section(kind: type[Section], table: Any, where: str) -> Section:
    """Makes a dataclass from a table, with the sections in it."""
    check(isinstance(table, dict), where, table, "give a table")
    hints = get_type_hints(kind)
    unknown = sorted(set(table) - set(hints))
    if unknown:
        raise ArgumentError(f"{where} has no field {unknown[0]!r}; allowed are {', '.join(sorted(hints))}")
    values = {name: _value(hints[name], value, f"{where}.{name}") for name, value in table.items()}
    try:
        return kind(**values)
    except ArgumentError as error:
        raise ArgumentError(f"{where}: {error}") from error
    except TypeError as error:
        names = [f.name for f in fields(kind)] if is_dataclass(kind) else []
        missing = [name for name in names if f"'{name}'" in str(error)]
        raise ArgumentError(f"{where} lacks {', '.join(missing)}; add it") from error


def _value(hint: Any, value: Any, where: str) -> Any:
    options = [option for option in getattr(hint, "__args__", ()) if is_dataclass(option)]
    if is_dataclass(hint) and isinstance(hint, type):
        return _section(hint, value, where)
    if options:
        return _section(options[0], value, where)  # type: ignore[arg-type]
    if hint is float and type(value) is int:
        return float(value)
    if hint in (int, float, bool, str):
        check(type(value) is hint, where, value, f"give a value of type {hint.__name__}")
        check(hint not in (int, float) or value >= 0, where, value, "give a number that is not negative")
        return value
    listed = getattr(hint, "__origin__", None) is tuple
    check(isinstance(value, list if listed else dict), where, value, f"give a {'list' if listed else 'table'}")
    return tuple(value) if listed else value
