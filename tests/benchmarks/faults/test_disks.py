"""Full and read-only disks under everything of ours that writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from twotower_bench.faults.disks import DISKS, WRITERS, NoSuchDisk, try_stats, try_writer

ON_ALL = [(disk, name) for disk in DISKS for name in WRITERS]


@pytest.fixture(scope="module", autouse=True)
def there_is_a_read_only_disk() -> None:
    try:
        with DISKS["read-only"]():
            pass
    except NoSuchDisk as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(("disk", "name"), ON_ALL)
def test_a_writer_says_one_sentence_and_leaves_no_half_written_file(disk: str, name: str) -> None:
    found = try_writer(name, WRITERS[name], disk)
    assert found.outcome == "held", found


@pytest.mark.parametrize("disk", DISKS)
def test_numbers_of_a_drafter_that_cannot_be_kept_cost_one_sentence(disk: str) -> None:
    found = try_stats(disk)
    assert found.outcome == "held", found


def test_a_writer_that_leaves_half_a_file_or_an_error_of_its_own_is_found() -> None:
    def careless(folder: Path) -> None:
        (folder / "half").write_text("x" * (64 << 10))

    assert try_writer("careless", careless, "full").faults[0].startswith("OSError: ")
