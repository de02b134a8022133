import math

import pytest
import torch
from torch import Tensor

from tests.support.builders import tiny_config
from twotower_spec import TwoTowerModel


def weights(seed: int = 0, device: str = "cpu") -> dict[str, Tensor]:
    """Float32 weights by published name, of a model whose layers are wide enough to tell a distribution by."""
    config = tiny_config(hidden_size=96, vocab_size=512)
    return dict(TwoTowerModel.from_config(config, seed=seed, context_device=device).checkpoint_tensors())


def test_seed_decides_every_weight() -> None:
    torch.manual_seed(1)
    first = weights(seed=3)
    torch.manual_seed(2)  # somebody else's generator
    again, other = weights(seed=3), weights(seed=4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_denoiser_starts_unmodulated() -> None:
    shift, scale, gate = weights()["scale_shift_tables.0"]
    assert max(shift.abs().max(), scale.abs().max(), (gate - 1).abs().max()) < 0.2


@pytest.mark.gpu
def test_weights_are_drawn_where_they_are() -> None:
    device = "cuda:0"
    drawn = weights(device=device)
    assert all(weight.device == torch.device(device) for weight in drawn.values())
    head = drawn["lm_head.weight"].cpu()
    assert head.std().item() == pytest.approx(1 / math.sqrt(head.shape[1]), rel=0.05)
    assert torch.equal(drawn["context_tower.norm_f.weight"].cpu(), torch.ones(96))
