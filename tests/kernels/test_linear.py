"""The product of tokens with a weight, in every order of operands, and squared ReLU in PyTorch and in Triton."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.support.tolerances import BFLOAT16_RELATIVE
from twotower_kernels.linear import linear, op, squared_relu
from twotower_kernels.linear.op import MOST_TOKENS_ON_THE_RIGHT
from twotower_kernels.linear.reference import linear_reference, squared_relu_reference
from twotower_kernels.tuning import read_table, trying


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("num_tokens", [1, 3, 64, MOST_TOKENS_ON_THE_RIGHT, MOST_TOKENS_ON_THE_RIGHT + 1])
@pytest.mark.parametrize("amx", [False, True])
def test_every_number_of_tokens_gives_the_same_product(
    num_tokens: int, amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(op, "has_amx", lambda: amx)
    x, weight = randn(num_tokens, 24), randn(17, 24, seed=1)
    got = linear(x.bfloat16(), weight.bfloat16())
    error = (got.double() - x @ weight.t()).norm() / (x @ weight.t()).norm()
    assert got.shape == (num_tokens, 17) and float(error) < BFLOAT16_RELATIVE


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_autocast_may_mix_the_dtypes(num_tokens: int) -> None:
    """So it is with a frozen float32 tower in training: activations are bfloat16 and weights float32."""
    x, weight = torch.ones(num_tokens, 8, dtype=torch.bfloat16), torch.ones(5, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear(x, weight), torch.full((num_tokens, 5), 8.0, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0,), (1,), (2,), (2, 3), (1, 17), (70,)])
def test_linear_equals_its_definition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = randn(*shape, 33).to(dtype), randn(21, 33, seed=1).to(dtype)
    actual, expected = linear(x, weight), linear_reference(x, weight)
    assert actual.shape == expected.shape and actual.dtype == dtype
    if actual.numel():
        assert ((actual - expected).double().norm() / expected.double().norm()).item() < BFLOAT16_RELATIVE


@pytest.fixture
def in_triton(device: torch.device) -> Callable[[Tensor], Tensor]:
    """Squared ReLU by its kernel, on any device."""

    def run(x: Tensor) -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(op, "use_triton", lambda *tensors: True)
            return squared_relu(x.to(device)).cpu()

    return run


SHAPES = [(1,), (0, 3), (2, 1, 37), (3, 17, 64)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_squared_relu_equals_its_definition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = randn(*shape).to(dtype)
    assert torch.equal(squared_relu(x), squared_relu_reference(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", [16, 64])
def test_squared_relu_kernel_is_the_pytorch_path_bit_for_bit(
    block: int, shape: tuple[int, ...], dtype: torch.dtype, in_triton: Callable[[Tensor], Tensor]
) -> None:
    x = randn(*shape).to(dtype)
    with trying("linear", "squared_relu", {"BLOCK": block, "num_warps": 4, "num_stages": 1}):
        actual = in_triton(x)
    assert torch.equal(actual, squared_relu(x)) and actual.dtype == dtype


def test_squared_relu_kernel_takes_views(in_triton: Callable[[Tensor], Tensor]) -> None:
    x = randn(5, 37).float().t()
    assert torch.equal(in_triton(x), squared_relu(x))


def test_squared_relu_kernel_lets_nan_and_infinity_pass(in_triton: Callable[[Tensor], Tensor]) -> None:
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 3e38])
    torch.testing.assert_close(in_triton(x), squared_relu(x), rtol=0, atol=0, equal_nan=True)


def test_squared_relu_kernel_writes_its_output_and_nothing_around_it(
    in_triton: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, margin = randn(3, 37).float(), 2048
    buffer = torch.full((x.numel() + 2 * margin,), torch.nan)
    held: list[Tensor] = []

    def poisoned(like: Tensor) -> Tensor:
        held.append(buffer.to(like.device))
        return held[0][margin:-margin].view(like.shape)

    monkeypatch.setattr(torch, "empty_like", poisoned)
    assert torch.isfinite(in_triton(x)).all()
    assert held[0][:margin].isnan().all() and held[0][-margin:].isnan().all()


def test_squared_relu_has_a_gradient() -> None:
    x = torch.tensor([-2.0, 0.0, 3.0], requires_grad=True)
    squared_relu(x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0.0, 0.0, 6.0]


def test_settings_in_use_are_among_those_the_tuner_may_choose() -> None:
    pytest.importorskip("triton")
    from twotower_kernels.linear.variants import CANDIDATES

    table = read_table("linear")["kernels"]
    assert table.keys() == CANDIDATES.keys()
    assert all(chosen in CANDIDATES[name] for name, chosen in table.items())
