"""The generated documents of both domains, and how they are divided into training and held-out ones."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from random import Random

from twotower_spec.training.corpus import maths, python_code, real_text, slots
from twotower_spec.training.corpus.slots import Document, Slots, Template

# Share of the words of training documents that are made up.
INVENTED = 0.35
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
    sources = (maths, python_code, slots, real_text)
    code = b"".join(Path(str(module.__file__)).read_bytes() for module in sources)
    return hashlib.sha256(code + Path(__file__).read_bytes()).hexdigest()


def training_documents(domain: str, count: int, seed: int) -> Iterator[Document]:
    """Documents from trained templates with trained and invented values; document i does not depend on `count`."""
    templates = training_templates(domain)
    for i in range(count):
        rng = Random(f"{seed}/{domain}/train/{i}")
        yield rng.choice(templates)(Slots(rng, invented=INVENTED))


def held_out_draws(domain: str, template: Template, part: HeldOut, seed: int) -> Iterator[Document]:
    """Draws of a template that training did not make.

    Held out by seed, a document has trained values in a new draw, which the caller compares with training's; by values
    and by template, it has held-out values.
    """
    for i in itertools.count():
        rng = Random(f"{seed}/{domain}/{template.__name__}/{part}/{i}")
        yield template(Slots(rng, held_out=part is not HeldOut.SEED))
