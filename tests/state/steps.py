"""Steps that many tests of the pool take."""

import torch
from torch import Tensor

from tests.support.tolerances import FLOAT64
from twotower_spec import TwoTowerModel
from twotower_spec.state import ContextState


def logits_after(model: TwoTowerModel, state: ContextState, request: object, ids: list[int]) -> Tensor:
    logits = state.extend(model.context, {request: ids}).logits
    assert logits is not None
    return logits[0]


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=FLOAT64, rtol=FLOAT64)
