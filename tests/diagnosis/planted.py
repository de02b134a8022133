"""Copies of the bundled models in which something is wrong, and the findings of a check."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from twotower_spec.demo.trio import Model, trio_path
from twotower_spec.diagnosis import Case, Finding, Verdict

Tensors = dict[str, Tensor]
Check = Callable[[Case], Iterable[Finding]]


def copy_of(model: Model, folder: Path) -> Path:
    """A copy of a bundled model; its files may be changed."""
    return Path(shutil.copytree(trio_path(model), folder))


def with_weights(folder: Path, change: Callable[[Tensors], None], model: Model = "twotower") -> Path:
    """A copy of a bundled model, by default the drafter, whose tensors were changed in place."""
    file = copy_of(model, folder) / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})
    return folder


def with_shards(folder: Path) -> Path:
    """A copy of the bundled verifier in two shards with their index."""
    file = copy_of("verifier", folder) / "model.safetensors"
    tensors, listed = load_file(file), dict[str, str]()
    names = sorted(tensors)
    for number, half in enumerate((names[::2], names[1::2]), 1):
        shard = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in half}, folder / shard, {"format": "pt"})
        listed |= dict.fromkeys(half, shard)
    file.unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    return folder


def with_config(folder: Path, model: Model = "twotower", **changes: Any) -> Path:
    """A copy of a bundled model with other fields in its config.json."""
    file = copy_of(model, folder) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def with_rows(folder: Path, rows: int) -> Path:
    """A copy of the bundled drafter with fewer token ids, its tokenizer included."""
    embeddings = ("context_lm_head.weight", "lm_head.weight", "context_tower.embeddings.weight")

    def cut(tensors: Tensors) -> None:
        for name in (*embeddings, "denoiser_tower.embeddings.weight"):
            tensors[name] = tensors[name][:rows].clone()

    config = with_weights(folder, cut) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": rows}))
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    model = content["model"]
    model["vocab"] = {token: number for token, number in model["vocab"].items() if number < rows}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    file.write_text(json.dumps(content))
    return folder


def with_permuted_tokens(folder: Path, model: Model) -> Path:
    """A copy of a bundled model whose tokenizer is as large, and numbers its tokens otherwise."""
    file = copy_of(model, folder) / "tokenizer.json"
    content = json.loads(file.read_text())
    vocab = content["model"]["vocab"]
    pieces = sorted((number, token) for token, number in vocab.items() if number > 300)
    for (number, _), (_, token) in zip(pieces, reversed(pieces), strict=True):
        vocab[token] = number
    file.write_text(json.dumps(content))
    return folder


def random_denoiser(tensors: Tensors) -> None:
    """Gives the denoiser weights as before training, of the same size."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if name.startswith(("denoiser_tower.layers", "lm_head")) and tensor.dim() > 1:
            noise = torch.randn(tensor.shape, generator=generator) * tensor.float().std()
            tensor.copy_(noise)


def findings(check: Check, drafter: Path | None = None, verifier: Path | None = None, **options: Any) -> list[Finding]:
    """Findings of a check about a drafter and a verifier, the bundled ones where none is given."""
    case = Case(str(drafter or trio_path("twotower")), str(verifier or trio_path("verifier")), **options)
    found = list(check(case))
    assert found
    return found


def the(found: Iterable[Finding], looked_at: str, verdict: Verdict) -> Finding:
    """The finding about something, which has this verdict and, where something is wrong, a remedy."""
    (one,) = [finding for finding in found if finding.looked_at == looked_at]
    assert one.verdict == verdict, one
    assert one.remedy or verdict in ("ok", "skipped"), one
    return one


def verdicts(found: Iterable[Finding]) -> set[Verdict]:
    """All verdicts that occur."""
    return {finding.verdict for finding in found}
