"""Settings of launches, and the arithmetic of their sizes."""

import pytest

from twotower_kernels.tuning import cdiv, next_power_of_2, read_table, settings, trying


@pytest.mark.parametrize("size", [1, 2, 3, 16, 17, 2688, 131072])
def test_sizes_are_those_of_triton(size: int) -> None:
    triton = pytest.importorskip("triton")
    assert next_power_of_2(size) == triton.next_power_of_2(size)
    assert [cdiv(size, part) for part in (1, 16, 48)] == [triton.cdiv(size, part) for part in (1, 16, 48)]


def test_settings_are_those_of_the_table_again_after_others_were_tried() -> None:
    table = read_table("time_modulation")["kernels"]["norm"]
    assert settings("time_modulation", "norm") == table
    with trying("time_modulation", "norm", {"num_warps": 16}):
        assert settings("time_modulation", "norm") == {"num_warps": 16}
    assert settings("time_modulation", "norm") == table
