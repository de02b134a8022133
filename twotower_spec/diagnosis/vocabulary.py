"""Vocabulary: what token ids mean in both models, the mask token, and ids that only one of them has."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from transformers import PreTrainedTokenizerBase

from twotower_spec.checkpoint import resolve_checkpoint
from twotower_spec.diagnosis.case import Case
from twotower_spec.diagnosis.finding import Finding
from twotower_spec.drafting.vocabulary import compare_vocabularies
from twotower_spec.errors import FileError
from twotower_spec.inspection import num_token_ids
from twotower_spec.reading import is_file, read_json

SHOWN_DIFFERENCES = 3
# Tokenizers that vLLM reads without a tokenizer.json.
OTHER_FORMS = ("tekken.json", "vocab.*", "*.model", "*.tiktoken")
DOWNLOAD = "use the config.json and the tokenizer that the weights were made with"

note = partial(Finding, "vocabulary")


def examine_drafter(case: Case) -> Iterator[Finding]:
    """Looks at the drafter's tokenizer beside its embedding table, and at its mask token."""
    tokenizer, rows = case.tokenizer, case.config.vocab_size
    if tokenizer is None:
        detail = f"{case.drafter_tokenizer.reason}, so that nobody sees what its ids mean"
        yield note("drafter's tokenizer", "warning", detail, "put the tokenizer.json of its model there")
        return
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows:
        detail = f"the tokenizer has ids up to {highest}, the embedding table {rows} rows: ids from there on stay out"
        yield note("drafter's tokenizer", "warning", detail, DOWNLOAD)
    else:
        padding = f", {rows - highest - 1} rows are padding" if highest + 1 < rows else ""
        yield note("drafter's tokenizer", "ok", f"{highest + 1} ids for {rows} rows{padding}")
    yield _mask_token(case, tokenizer)


def _mask_token(case: Case, tokenizer: PreTrainedTokenizerBase) -> Finding:
    mask = case.config.mask_token_id
    token = tokenizer.convert_ids_to_tokens(mask) if mask in tokenizer.get_vocab().values() else None
    named = ("bos", "eos", "pad", "unk")
    taken = [name for name in named if getattr(tokenizer, f"{name}_token_id") == mask]
    ends = case.config.eos_token_id if isinstance(case.config.eos_token_id, tuple) else (case.config.eos_token_id,)
    if "eos" not in taken and mask in ends:
        taken.append("eos")
    remedy = "give the mask_token_id in config.json that the denoiser was trained with (published: 3)"
    if taken:
        detail = f"id {mask} is {token!r}, the {taken[0]} token: a block of it says something else to the denoiser"
        return note("mask token", "fault", detail, remedy)
    if token is not None and mask not in tokenizer.added_tokens_decoder:
        detail = f"id {mask} is {token!r}, a piece of text: every text with it holds masked positions"
        return note("mask token", "fault", detail, remedy)
    return note(
        "mask token", "ok", f"id {mask}, {'which the tokenizer does not have' if token is None else repr(token)}"
    )


def _may_be_served(case: Case) -> bool:
    """Whether vLLM may read a tokenizer of the verifier that is not read here: another form, or code of its own."""
    directory = resolve_checkpoint(str(case.verifier), files=("tokenizer*.json", *OTHER_FORMS))
    if is_file(directory / "tokenizer.json"):
        return False
    if any(any(directory.glob(form)) for form in OTHER_FORMS):
        return True
    try:
        return "auto_map" in read_json(directory / "tokenizer_config.json")
    except (FileError, TypeError):
        return False


def examine_pair(case: Case) -> Iterator[Finding]:
    """Looks at what the ids of both models mean, whatever their number."""
    target, reason = case.verifier_tokenizer
    rows, drafter_rows = num_token_ids(str(case.verifier)), case.config.vocab_size
    if target is None and not _may_be_served(case):
        remedy = "put the tokenizer files of its model there, or serve token ids alone with --skip-tokenizer-init"
        yield note("same tokens", "fault", f"{reason}, and vllm serve needs it", remedy)
        return
    if target is None or case.tokenizer is None:
        detail = f"{reason or case.drafter_tokenizer.reason}, and the models have {rows} and {drafter_rows} ids"
        remedy = "put the tokenizer.json of its model there"
        yield note("same tokens", "warning" if rows == drafter_rows else "fault", detail, remedy)
        return
    found = compare_vocabularies(target, case.tokenizer, rows, drafter_rows)
    train = "give a drafter that shares the verifier's tokenizer: `twotower-spec train all --verifier DIR` makes one"
    if found.differences:
        shown = ", ".join(
            f"{one.token_id} ({one.target!r} and {one.drafter!r})" for one in found.differences[:SHOWN_DIFFERENCES]
        )
        detail = f"{len(found.differences)} of {found.num_compared} ids mean different tokens: {shown}, ..."
        yield note("same tokens", "fault", detail, train)
        return
    if not found.num_compared:
        yield note("same tokens", "fault", "no id has a token in both tokenizers", train)
        return
    yield note("same tokens", "ok", f"all {found.num_compared} ids that both tokenizers name mean the same")
    foreign = [token for token in target.get_vocab().values() if drafter_rows <= token < rows]
    if foreign:
        detail = f"{len(foreign)} tokens of the verifier, from id {min(foreign)} on, are none of the drafter's"
        yield note("padding", "warning", f"{detail}: a request that has one gets no drafts", train)
    elif rows != drafter_rows:
        detail = (
            f"the verifier has {rows} rows, the drafter {drafter_rows}: ids from {found.num_shared_ids} on stay out"
        )
        yield note("padding", "ok", detail)
    else:
        yield note("padding", "ok", f"both have {rows} rows")
