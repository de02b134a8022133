"""Words that fill slots in place of those of the pools, so that a model learns to copy and not the pools by heart."""

from __future__ import annotations

import builtins
import keyword
import re
from collections.abc import Iterable
from random import Random

from twotower_spec.training.corpus.real_text import gsm8k_train

CONSONANTS = [
    "b",
    "br",
    "c",
    "ch",
    "d",
    "dr",
    "f",
    "g",
    "gr",
    "h",
    "j",
    "k",
    "l",
    "m",
    "n",
    "p",
    "pl",
    "r",
    "s",
    "st",
    "t",
    "tr",
    "v",
    "w",
]
VOWELS = ["a", "e", "i", "o", "u", "ai", "ee", "ou"]
ENDINGS = ["", "l", "n", "nd", "r", "rt", "t", "x"]
NUM_MADE_UP = 4000
REAL_WORD = re.compile(r"\b[a-z]{3,9}\b")


def other_words(left_out: Iterable[str]) -> tuple[str, ...]:
    """Made-up words of syllables, and the words of GSM8K's training split.

    Args:
        left_out: words that training must not hold, in any case.
    """
    held_out = {word.lower() for word in left_out}
    # A slot may add an ending: the stems of held-out words must not come in either.
    stems = {word.removesuffix(ending) for word in held_out for ending in ("s", "es", "d", "ed")}
    unusable = held_out | stems | set(keyword.kwlist) | set(dir(builtins))
    rng = Random("words")
    made_up = {_made_up(rng) for _ in range(NUM_MADE_UP)}
    real = {word for text in gsm8k_train() for word in REAL_WORD.findall(text)}
    return tuple(sorted((made_up | real) - unusable))


def _made_up(rng: Random) -> str:
    syllables = [rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(rng.randint(2, 3))]
    return "".join(syllables) + rng.choice(ENDINGS)
