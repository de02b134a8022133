"""The generated documents of both domains, and how they are divided into training and held-out ones."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from enum import StrEnum
from random import Random

from twotower_spec.training.corpus import maths, python_code
from twotower_spec.training.corpus.slots import Document, Slots, Template

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


def version(domain: str) -> str:
    """A digest that changes when a template or a pool of the domain does."""
    texts = [template(Slots(Random(0), held)).text for template in DOMAINS[domain].TEMPLATES for held in (False, True)]
    return hashlib.sha256("".join(texts).encode()).hexdigest()


def training_documents(domain: str, count: int, seed: int) -> Iterator[Document]:
    """Documents from trained templates with trained slot values; document i is the same whatever `count` is."""
    templates = training_templates(domain)
    for i in range(count):
        rng = Random(f"{seed}/{domain}/train/{i}")
        yield rng.choice(templates)(Slots(rng))


def held_out_documents(domain: str, part: HeldOut, count: int, seed: int) -> Iterator[tuple[str, Document]]:
    """Template names and documents that training never saw.

    Held out by seed, a document has a trained template and trained values in a new draw; by values, a trained template
    and held-out values; by template, a held-out template and held-out values.
    """
    templates = held_out_templates(domain) if part is HeldOut.TEMPLATE else training_templates(domain)
    for i in range(count):
        rng = Random(f"{seed}/{domain}/{part}/{i}")
        template = templates[i % len(templates)] if part is HeldOut.TEMPLATE else rng.choice(templates)
        yield template.__name__, template(Slots(rng, held_out=part is not HeldOut.SEED))
