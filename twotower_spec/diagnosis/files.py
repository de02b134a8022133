"""Files: whether both models can be read, and are what they are taken for."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from safetensors import SafetensorError, safe_open

from twotower_spec.checkpoint.index import INDEX_FILE
from twotower_spec.config import architectures_of
from twotower_spec.diagnosis.case import Case
from twotower_spec.diagnosis.finding import Finding, refusal
from twotower_spec.drafting.block_drafter import block_size_of
from twotower_spec.errors import CheckpointError, FileError, TwoTowerError, first_line
from twotower_spec.inspection import inspect_checkpoint, num_token_ids
from twotower_spec.printable import byte_text
from twotower_spec.reading import is_directory, is_file, read_json

SHOWN_PROBLEMS = 3
# Endings of most architectures that write text.
WRITERS = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")
# What vLLM loads besides safetensors, and what a training leaves that looks the same.
OTHER_WEIGHTS = ("*.bin", "*.pt", "*.gguf", "*.tensors")
LEFT_BY_TRAINING = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pt")
EMBEDDINGS, FLOATS = (".embed_tokens.weight", ".embeddings.weight"), ("F64", "F32", "F16", "BF16")
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
DOWNLOAD = "download it again"
OTHER_CONFIG = "use the config.json that the weights were made with, or download the checkpoint again"

note = partial(Finding, "files")


def examine_drafter(case: Case) -> Iterator[Finding]:
    """Looks at config.json, the index and all headers of the drafter."""
    found = inspect_checkpoint(str(case.drafter), revision=case.revision)
    if found.problems:
        more = len(found.problems) - SHOWN_PROBLEMS
        # A file that cannot be read brings its remedy, tensors that do not fit the configuration have one together.
        parts = [_parted(problem) for problem in found.problems[:SHOWN_PROBLEMS]]
        detail = "; ".join(said for said, _ in parts) + (f"; and {more} more" if more > 0 else "")
        own = dict.fromkeys(remedy for _, remedy in parts if remedy)
        yield note("drafter", "fault", detail, "; ".join(own) or f"{OTHER_CONFIG}; `twotower-spec inspect` lists all")
        return
    size = sum(part.num_bytes for part in found.parts.values())
    yield note(
        "drafter", "ok", f"{found.directory}: {case.config.layer_kinds}, {len(case.index)} tensors, {byte_text(size)}"
    )
    try:
        yield note("block size", "ok", str(block_size_of(case.directory)))
    except TwoTowerError as error:
        yield refusal("files", "block size", error)


def _parted(problem: str) -> tuple[str, str]:
    """A problem and its remedy, "" where it has none."""
    detail, _, remedy = problem.rpartition("; ")
    if not detail:
        return problem, ""
    # What a reader said of the file stands in brackets, with a remedy for files that somebody wrote.
    return (f"{detail})", DOWNLOAD) if remedy.count(")") > remedy.count("(") else (detail, remedy)


def examine_verifier(case: Case) -> Iterator[Finding]:
    """Looks at config.json of the verifier, and at its weights where they are on this machine."""
    try:
        architectures = architectures_of(case.verifier_config)
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
    yield from _verifier_weights(case, num_ids)


def _verifier_weights(case: Case, num_ids: int) -> Iterator[Finding]:
    """Opens the headers of a local verifier; of a hub id nothing is downloaded, and nothing said."""
    directory = Path(str(case.verifier))
    if not is_directory(directory):
        return
    try:
        shards = weight_files(directory)
        rows = _embedding_rows(shards)
    except CheckpointError as error:
        yield refusal("files", "verifier's weights", error)
        return
    if not shards:
        yield note("verifier's weights", "skipped", "no safetensors: other weights are not looked into")
        return
    # Of models of several parts nobody knows here which table is the one of config.json.
    if "vocab_size" in case.verifier_config and rows < num_ids:
        detail = f"the embedding table has {rows:.0f} rows, and config.json says {num_ids} in vocab_size"
        yield note("verifier's weights", "fault", detail, OTHER_CONFIG)
        return
    size = byte_text(sum(shard.stat().st_size for shard in shards))
    yield note("verifier's weights", "ok", f"{size} of safetensors, and no file is cut off")


def weight_files(directory: Path) -> list[Path]:
    """Lists the safetensors files that vLLM reads in a directory; none where weights are there in another form.

    Raises:
        CheckpointError: there are no weights, or some are not there, or are only pointers to them.

    Source: `_prepare_weights` in vllm/model_executor/model_loader/default_loader.py.
    """
    official, index = sorted(directory.glob("consolidated*.safetensors")), directory / INDEX_FILE
    shards = official or sorted(directory.glob("*.safetensors"))
    others = [path for form in OTHER_WEIGHTS for path in directory.glob(form) if path.name not in LEFT_BY_TRAINING]
    if is_file(index) and not official and (shards or not others):
        shards = _listed(index)
    if not shards and not others:
        raise CheckpointError(f"{directory} holds no weights; put the safetensors files of its model there")
    _refuse_pointers(shards or others)
    return shards


def _listed(index: Path) -> list[Path]:
    try:
        names = {str(name) for name in read_json(index)["weight_map"].values()}
        if not names:
            raise ValueError("weight_map is empty")
    except (FileError, ValueError, KeyError, AttributeError, TypeError) as error:
        reason = str(error).partition("; ")[0] if isinstance(error, FileError) else repr(error)
        raise CheckpointError(f"{index} is not a safetensors index ({reason}); {DOWNLOAD}") from error
    absent = sorted(name for name in names if not is_file(index.parent / name))
    if absent:
        raise CheckpointError(f"{index} names shards that are not there: {', '.join(absent)}; download them again")
    return sorted(index.parent / name for name in names)


def _refuse_pointers(paths: Sequence[Path]) -> None:
    for path in paths:
        try:
            with path.open("rb") as file:
                is_pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror}); {DOWNLOAD}") from error
        if is_pointer:
            raise CheckpointError(f"{path} is a git-lfs pointer in place of the weights; `git lfs pull` fetches them")


def _embedding_rows(shards: Sequence[Path]) -> float:
    """Rows of the largest embedding table; infinity where none is found, or one that is not plain floats.

    Raises:
        CheckpointError: a file is no safetensors file, or is cut off.
    """
    # Of a table that several ranks share each file holds some rows.
    rows: dict[str, float] = defaultdict(float)
    for shard in shards:
        try:
            with safe_open(shard, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a mapping)
                    if f".{name}".endswith(EMBEDDINGS):
                        table = opened.get_slice(name)
                        shape = table.get_shape()
                        is_plain = len(shape) == 2 and table.get_dtype() in FLOATS
                        rows[name] += shape[0] if is_plain else math.inf
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{shard} is truncated or corrupt ({first_line(error)}); {DOWNLOAD}") from error
    return max(rows.values(), default=math.inf)
