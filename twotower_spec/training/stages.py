"""The stages of a training, each from files to files: tokenizer, verifier, context tower, samples, denoiser, draft."""

from __future__ import annotations

import hashlib
import itertools
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from twotower_spec.checkpoint import save_checkpoint
from twotower_spec.config import read_config
from twotower_spec.errors import ArgumentError, first_line
from twotower_spec.model import TwoTowerModel
from twotower_spec.terminal import Terminal
from twotower_spec.towers.backbone import Backbone
from twotower_spec.training.language_models import (
    NextTokenLoss,
    build_language_model,
    save_language_model,
)
from twotower_spec.training.loop import Loss
from twotower_spec.training.optimiser import Optimiser
from twotower_spec.training.recipe import LanguageModelRecipe, TrainingConfig
from twotower_spec.training.sampling import sample_continuations
from twotower_spec.training.streams import TokenStream
from twotower_spec.training.tokenizer import train_tokenizer
from twotower_spec.training.tower_losses import ContextLoss, DenoiserLoss, ExpertBalance
from twotower_spec.training.workspace import VERIFIER_SAMPLES, Workspace

if TYPE_CHECKING:  # transformers' models take seconds to import
    from transformers import PreTrainedModel

# Tokenizer training sees at most this much of every source.
TOKENIZER_CHARACTERS = 4_000_000
# Compilers that torch.compile can use for a CPU.
CPP_COMPILERS = ("g++", "clang++", "c++")
# Every run draws its batches with a seed of its own.
SEEDS = {"verifier": 1, "context": 2, "context-distilled": 3, "denoiser": 4, "draft": 5}


def train_tokenizer_stage(workspace: Workspace, _device: torch.device) -> Path:
    """Trains the tokenizer on a part of every source."""
    place = workspace.directory / "tokenizer"
    texts = itertools.chain.from_iterable(_beginning(workspace, source) for source in workspace.sources())
    train_tokenizer(texts, workspace.recipe.tokenizer.vocab_size).save_pretrained(place)
    return place


def _beginning(workspace: Workspace, source: str) -> list[str]:
    texts, characters = [], 0
    for text in workspace.documents(source):
        texts.append(text)
        characters += len(text)
        if characters > TOKENIZER_CHARACTERS:
            break
    return texts


def train_verifier_stage(workspace: Workspace, device: torch.device) -> Path:
    """Trains the verifier on the corpus."""
    assert workspace.recipe.verifier is not None
    return _train_language_model(workspace, "verifier", workspace.recipe.verifier, device)


def train_draft_stage(workspace: Workspace, device: torch.device) -> Path:
    """Trains the AR draft model, the towers' rival, on the same text as the towers."""
    assert workspace.recipe.draft is not None
    return _train_language_model(workspace, "draft", workspace.recipe.draft, device)


def _train_language_model(workspace: Workspace, name: str, recipe: LanguageModelRecipe, device: torch.device) -> Path:
    tokenizer = workspace.tokenizer()
    model = build_language_model(recipe.model, workspace.vocab_size(), tokenizer, workspace.recipe.seed + SEEDS[name])
    model.to(device)  # type: ignore[arg-type]
    optimiser = Optimiser(model, model.named_parameters(), recipe.training)
    _train(workspace, name, recipe.training, NextTokenLoss(model), optimiser, model, device, None, asdict(recipe.model))
    place = workspace.directory / name
    save_language_model(model, tokenizer, place)
    return place


def train_context_stage(workspace: Workspace, device: torch.device) -> Path:
    """Trains the context tower on the corpus."""
    recipe = workspace.recipe
    model = TwoTowerModel.from_config(workspace.two_tower_config(), seed=recipe.seed + SEEDS["context"])
    return _train_context(workspace, "context", recipe.context, model, device)


def distill_stage(workspace: Workspace, device: torch.device) -> Path:
    """Trains the context tower further on text sampled from the verifier; the result is the frozen tower."""
    distill = workspace.recipe.distill
    assert distill is not None
    sample_verifier_stage(workspace, device)
    start = workspace.require("context", "context")
    model = TwoTowerModel.from_pretrained(start, towers="context", dtype=torch.float32, progress=False)
    return _train_context(workspace, "context-distilled", distill.training, model, device)


def _train_context(
    workspace: Workspace, name: str, training: TrainingConfig, model: TwoTowerModel, device: torch.device
) -> Path:
    inputs = (model.config.to_json(), digest(model.context))
    model.context.to(device)
    optimiser = Optimiser(model.context, model.context.checkpoint_tensors(), training)
    balance = ExpertBalance(model.context, model)
    _train(workspace, name, training, ContextLoss(model), optimiser, model.context, device, balance, *inputs)
    place = workspace.directory / name
    tensors = dict(model.context.checkpoint_tensors())
    dtypes = dict.fromkeys(tensors, torch.bfloat16)
    save_checkpoint(place, tensors, dtypes, model.config.to_json())
    return place


def sample_verifier_stage(workspace: Workspace, device: torch.device) -> Path:
    """Lets the verifier continue beginnings of the corpus; the results are a text source like any other."""
    distill = workspace.recipe.distill
    assert distill is not None
    place = workspace.stream_directory(VERIFIER_SAMPLES)
    if not TokenStream.is_saved(place):
        verifier = load_verifier(workspace.require("verifier", "verifier"), device, torch.bfloat16)
        documents = sample_continuations(workspace, verifier, distill.sampling)
        TokenStream.from_documents(documents).save(place)
    return place


def load_verifier(directory: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Loads a causal language model of transformers, from safetensors only.

    Raises:
        ArgumentError: it cannot be read.
    """
    from transformers import AutoModelForCausalLM

    try:
        read_config(directory)  # within bounds, unlike what transformers does
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, use_safetensors=True, trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise ArgumentError(f"the model in {directory} cannot be loaded: {reason}") from error
    model.to(device).eval()  # type: ignore[arg-type]
    return model


def train_denoiser_stage(workspace: Workspace, device: torch.device) -> Path:
    """Trains the denoiser on the frozen context tower and writes the whole checkpoint.

    Raises:
        RuntimeError: the context tower changed, which would be an error of this library.
    """
    recipe = workspace.recipe
    tokenizer = workspace.tokenizer()
    context = TwoTowerModel.from_pretrained(workspace.context, towers="context", dtype=torch.float32, progress=False)
    model = TwoTowerModel.from_config(context.config, seed=recipe.seed + SEEDS["denoiser"])
    start_denoiser_from_context_(model, context)
    frozen = digest(model.context)
    model.context.to(device)
    model.denoiser.to(device)
    training, masking = recipe.denoiser.training, recipe.denoiser.masking
    optimiser = Optimiser(model.denoiser, model.denoiser.checkpoint_tensors(), training)
    balance = ExpertBalance(model.denoiser, model)
    loss = DenoiserLoss(model, masking, recipe.seed + SEEDS["denoiser"])
    _train(workspace, "denoiser", training, loss, optimiser, model.denoiser, device, balance, frozen, asdict(masking))
    if digest(model.context) != frozen:
        raise RuntimeError("the frozen context tower changed while the denoiser was trained")
    place = workspace.directory / "twotower"
    tensors = dict(model.checkpoint_tensors())
    save_checkpoint(place, tensors, dict.fromkeys(tensors, torch.bfloat16), model.config.to_json())
    tokenizer.save_pretrained(place)
    return place


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works for a device; says what is missing if it does not."""
    if device.type != "cpu" or any(map(shutil.which, CPP_COMPILERS)):
        return True
    missing = f"compile = true needs a C++ compiler ({', '.join(CPP_COMPILERS)}); going on uncompiled"
    Terminal(stderr=True).print(missing)
    return False


@torch.no_grad()
def start_denoiser_from_context_(model: TwoTowerModel, context: TwoTowerModel) -> None:
    """Copies the context tower into both towers; the time conditioning starts without any effect."""
    model.context.load_state_dict(context.context.state_dict())
    model.denoiser.load_state_dict(context.context.state_dict(), strict=False)
    time = model.denoiser.time_conditioning
    time.w3.zero_()
    time.b3.zero_()
    time.tables.copy_(torch.tensor([0.0, 0.0, 1.0])[:, None].expand_as(time.tables[0]))


def digest(tower: Backbone) -> str:
    """SHA-256 of all weights of a tower."""
    total = hashlib.sha256()
    for _, tensor in tower.checkpoint_tensors():
        total.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _train(
    workspace: Workspace,
    name: str,
    training: TrainingConfig,
    loss: Loss,
    optimiser: Optimiser,
    module: nn.Module,
    device: torch.device,
    balance: ExpertBalance | None = None,
    *inputs: object,
) -> None:
    module.train()
    if training.compile and can_compile(device):
        module.compile()
    run = workspace.run(name, training, *inputs)
    run.describe(workspace.mixture_weights(training), workspace.recipe.seed, [path.name for path in workspace.texts])
    data = workspace.mixture(training, workspace.recipe.seed * 100 + SEEDS[name])
    run.train(loss, optimiser, data, device, balance.update if balance else None)
