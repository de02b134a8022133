"""Products of a tower are rounded once on a GPU, and the process's own setting stays what it was."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.builders import tiny_config
from tests.support.cuda import emulated_devices
from twotower_kernels.linear import rounded_once
from twotower_spec import GenerationOptions, TwoTowerModel

SWITCHES = torch.backends.cuda.matmul
NAMES = {
    torch.bfloat16: "allow_bf16_reduced_precision_reduction",
    torch.float16: "allow_fp16_reduced_precision_reduction",
}
PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::linear"}


def setting(name: str) -> tuple[bool, bool]:
    return getattr(SWITCHES, name), getattr(SWITCHES, f"{name}_split_k")


@pytest.fixture(params=[(True, True), (False, True), (False, False)], ids=str)
def of_the_process(request: pytest.FixtureRequest) -> Iterator[tuple[bool, bool]]:
    """Sets, as a process might have before, whether parts may be rounded and whether there may be any."""
    before = {name: setting(name) for name in NAMES.values()}
    for name in NAMES.values():
        setattr(SWITCHES, name, request.param)
    yield request.param
    for name, value in before.items():
        setattr(SWITCHES, name, value)


@pytest.mark.parametrize("dtype", NAMES)
def test_only_rounding_of_parts_is_off_and_only_within(of_the_process: tuple[bool, bool], dtype: torch.dtype) -> None:
    name, splits = NAMES[dtype], of_the_process[1]
    for device, dtype_within, expected in (
        ("cuda:0", dtype, (False, splits)),
        ("cpu", dtype, of_the_process),
        ("cuda:0", torch.float32, of_the_process),
    ):
        with rounded_once(torch.device(device), dtype_within):
            assert setting(name) == expected
        assert setting(name) == of_the_process


def test_the_setting_is_back_after_a_pass_that_failed(of_the_process: tuple[bool, bool]) -> None:
    with pytest.raises(KeyError), rounded_once(torch.device("cuda:0"), torch.bfloat16):
        raise KeyError
    assert setting(NAMES[torch.bfloat16]) == of_the_process


class Products(TorchDispatchMode):
    """Notes the setting at every product on a device."""

    def __init__(self) -> None:
        super().__init__()
        self.settings: list[tuple[bool, bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in PRODUCTS and args[0].is_cuda and args[0].dtype == torch.bfloat16:
            self.settings.append(setting(NAMES[torch.bfloat16]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["mask-diffusion", "ar"])
def test_every_product_of_the_towers_is_rounded_once(of_the_process: tuple[bool, bool], mode: str) -> None:
    with emulated_devices(runs_kernels=False):
        model = TwoTowerModel.from_config(
            tiny_config(), dtype="bfloat16", context_device="cuda:0", denoiser_device="cuda:0"
        )
        with Products() as products:
            model.generate([[3, 4, 5]], GenerationOptions(mode=mode, max_new_tokens=4))
    assert len(products.settings) > 10
    assert set(products.settings) == {(False, of_the_process[1])}
    assert setting(NAMES[torch.bfloat16]) == of_the_process
