"""The generated documents of both domains, and how they are divided into training and held-out ones."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from enum import StrEnum
from functools import cache
from pathlib import Path
from random import Random

from twotower_spec.training.corpus import arithmetic, maths, python_code, real_text, slots, words
from twotower_spec.training.corpus.slots import Document, Slots, Template, held_out_part
from twotower_spec.training.corpus.words import other_words

DOMAINS = {"maths": maths, "python": python_code}


class HeldOut(StrEnum):
    """What of a held-out document training never saw."""

    TEMPLATE = "template"
    VALUES = "values"
    SEED = "seed"


def training_templates(domain: str) -> list[Template]:
    """The templates of a domain that are trained on."""
    module = DOMAINS[domain]
    return [template for template in module.TEMPLATES if template.__name__ not in module.HELD_OUT]


def held_out_templates(domain: str) -> list[Template]:
    """The templates of a domain that are not."""
    module = DOMAINS[domain]
    return [template for template in module.TEMPLATES if template.__name__ in module.HELD_OUT]


def version() -> str:
    """A digest that changes with the code the corpus is made by."""
    sources = (arithmetic, maths, python_code, slots, real_text, words)
    code = b"".join(Path(str(module.__file__)).read_bytes() for module in sources)
    return hashlib.sha256(code + Path(__file__).read_bytes()).hexdigest()


@cache
def _training_words() -> tuple[str, ...]:
    """Words for training's slots besides the pools: none that is held out anywhere."""
    pools = [pool for module in DOMAINS.values() for pool in vars(module).values() if isinstance(pool, tuple)]
    held_out = [value for pool in pools for value in held_out_part(pool)]
    parts = [part for value in held_out for part in (value if isinstance(value, tuple) else (value,))]
    return other_words(word for part in parts if isinstance(part, str) for word in part.split())


def training_documents(domain: str, count: int, seed: int) -> Iterator[Document]:
    """Documents from trained templates with trained values and other words; document i does not depend on `count`."""
    templates, other = training_templates(domain), _training_words()
    for i in range(count):
        rng = Random(f"{seed}/{domain}/train/{i}")
        yield rng.choice(templates)(Slots(rng, other_words=other))


def held_out_draws(domain: str, template: Template, part: HeldOut, seed: int) -> Iterator[Document]:
    """Draws of a template that training did not make.

    Held out by seed, a document has trained values in a new draw, which the caller compares with training's; by values
    and by template, it has held-out values.
    """
    for i in itertools.count():
        rng = Random(f"{seed}/{domain}/{template.__name__}/{part}/{i}")
        yield template(Slots(rng, held_out=part is not HeldOut.SEED))
