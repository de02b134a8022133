"""Muon and AdamW over fused and stacked weights."""

import pytest
import torch

from tests.support.builders import random_ids, tiny_config
from twotower_spec import TwoTowerModel
from twotower_spec.training.optimiser import Optimiser
from twotower_spec.training.recipe import TrainingConfig
from twotower_spec.training.tower_losses import ContextLoss

CONFIG = TrainingConfig(steps=100, sources={"maths": 1.0}, warmup=0.1, decay=0.35)


def model_and_optimiser() -> tuple[TwoTowerModel, Optimiser]:
    model = TwoTowerModel.from_config(tiny_config(), seed=1)
    return model, Optimiser(model.context, model.context.checkpoint_tensors(), CONFIG)


def step(model: TwoTowerModel, optimiser: Optimiser, number: int) -> None:
    rows = torch.tensor([random_ids(25, number)])
    ContextLoss(model)(rows, number).loss.backward()
    optimiser.step(number)


def test_rates_warm_up_stay_and_decay_to_zero() -> None:
    _, optimiser = model_and_optimiser()
    scales = [optimiser.scale(number) for number in range(CONFIG.steps)]
    assert scales[0] == pytest.approx(0.1) and scales[9] == 1.0 and scales[64] == 1.0
    assert scales[65] == 1.0 and scales[66] < 1.0 and scales[99] == pytest.approx(1 / 35)
    assert scales[9:] == sorted(scales[9:], reverse=True)


def test_a_step_moves_the_weights_of_the_tower_itself_and_clears_gradients() -> None:
    model, optimiser = model_and_optimiser()
    before = {name: view.clone() for name, view in model.context.checkpoint_tensors()}
    step(model, optimiser, 50)
    for name, view in model.context.checkpoint_tensors():
        moved = not torch.equal(before[name], view)
        assert moved != name.endswith("e_score_correction_bias"), name
    assert all(float(p.grad.abs().sum()) == 0 for p in model.context.parameters() if p.grad is not None)


def test_fused_and_stacked_matrices_are_stepped_one_by_one() -> None:
    """Each published matrix moves as Muon alone would move it, with the gradient of its slice."""
    model, optimiser = model_and_optimiser()
    name = "context_tower.layers.3.mixer.k_proj.weight"
    before = dict(model.context.checkpoint_tensors())[name].clone()
    ContextLoss(model)(torch.tensor([random_ids(25)]), 0).loss.backward()
    gradient = optimiser.leaves[name].grad
    assert gradient is not None
    alone = torch.nn.Parameter(before.clone())
    norm = torch.stack([p.grad.norm() for p in model.context.parameters() if p.grad is not None]).norm()
    alone.grad = gradient.clone() * min(1.0, CONFIG.clip_norm / (float(norm) + 1e-6))
    torch.optim.Muon([alone], lr=CONFIG.muon_lr * 0.1, weight_decay=CONFIG.weight_decay).step()
    optimiser.step(0)
    torch.testing.assert_close(optimiser.leaves[name].detach(), alone.detach(), rtol=0, atol=1e-6)


def test_embeddings_heads_routers_and_convolutions_are_left_to_adamw() -> None:
    _, optimiser = model_and_optimiser()
    muon = {id(p) for p in optimiser._optimisers[0].param_groups[0]["params"]}
    names = {name for name, leaf in optimiser.leaves.items() if id(leaf) in muon}
    assert names and all("_proj" in name for name in names)
    assert not any("embeddings" in n or "head" in n or "gate.weight" in n or "conv1d" in n for n in names)


def test_state_survives_saving_and_the_next_step_is_the_same() -> None:
    model, optimiser = model_and_optimiser()
    step(model, optimiser, 20)
    other, restored = model_and_optimiser()
    with torch.no_grad():
        for name, leaf in restored.leaves.items():
            leaf.copy_(optimiser.leaves[name])
    restored.load_state_tensors({name: value.clone() for name, value in optimiser.state_tensors().items()})
    step(model, optimiser, 21)
    step(other, restored, 21)
    for name, leaf in optimiser.leaves.items():
        assert torch.equal(leaf, restored.leaves[name]), name
