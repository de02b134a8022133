"""Files: whether both models can be read, and are what they are taken for."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from twotower_spec.diagnosis.case import Case
from twotower_spec.diagnosis.finding import Finding, refusal
from twotower_spec.drafting.block_drafter import block_size_of
from twotower_spec.errors import TwoTowerError
from twotower_spec.inspection import inspect_checkpoint, num_token_ids
from twotower_spec.printable import byte_text

SHOWN_PROBLEMS = 3
# Endings of most architectures that write text.
WRITERS = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")

note = partial(Finding, "files")


def examine_drafter(case: Case) -> Iterator[Finding]:
    """Looks at config.json, the index and all headers of the drafter."""
    found = inspect_checkpoint(str(case.drafter), revision=case.revision)
    if found.problems:
        more = len(found.problems) - SHOWN_PROBLEMS
        detail = "; ".join(found.problems[:SHOWN_PROBLEMS]) + (f"; and {more} more" if more > 0 else "")
        remedy = "use the config.json that the weights were made with, or download the checkpoint again"
        yield note("drafter", "fault", detail, f"{remedy}; `twotower-spec inspect` lists all")
        return
    size = sum(part.num_bytes for part in found.parts.values())
    yield note(
        "drafter", "ok", f"{found.directory}: {case.config.layer_kinds}, {len(case.index)} tensors, {byte_text(size)}"
    )
    try:
        yield note("block size", "ok", str(block_size_of(case.directory)))
    except TwoTowerError as error:
        yield refusal("files", "block size", error)


def examine_verifier(case: Case) -> Iterator[Finding]:
    """Looks at config.json of the verifier."""
    try:
        architectures = [str(one) for one in case.verifier_config.get("architectures") or ()]
        num_ids = num_token_ids(str(case.verifier))
    except TwoTowerError as error:
        yield refusal("files", "verifier", error)
        return
    name = ", ".join(architectures) or "an unnamed architecture"
    if any(one.endswith(WRITERS) for one in architectures):
        yield note("verifier", "ok", f"{case.verifier}: {name}, {num_ids} token ids")
    else:
        detail = f"{case.verifier} is {name}, an architecture of an unusual name: it may be none that writes text"
        remedy = "see what vLLM says of it below; give the directory or hub id of a model that it generates text with"
        yield note("verifier", "warning", detail, remedy)
