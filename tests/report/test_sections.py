"""What sections say about measurements whose answer is known."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.report.builders import (
    TWO_TOWER,
    load_points,
    serving_cells,
    swept_cells,
    write_all,
    write_rows,
    write_standalone,
)
from tests.support.serving_cells import AGAIN, NONE
from twotower_spec.evaluation.serving import ServingCell, System
from twotower_spec.evaluation.statistics import Comparison
from twotower_spec.report import report_of
from twotower_spec.report.document import Line, Section, Table
from twotower_spec.report.findings import Outcome, finding


def section_of(tmp_path: Path, cells: list[ServingCell]) -> Section:
    (section,) = report_of([write_rows(tmp_path / "f.jsonl", "serving_cell", cells)]).sections
    return section


def table(section: Section, title: str) -> Table:
    return next(one for one in section.tables if one.title == title)


def cells_of(found: Table, row: str) -> dict[str, str]:
    """The first row of that name by column."""
    first = next(one for group in found.groups for one in group.rows if one.cells[0] == row)
    return dict(zip(found.columns, first.cells, strict=True))


def outcome(system: System, place: str, rates: tuple[float, float, float]) -> Outcome:
    comparison = Comparison.of_rates((10.0, 10.1, 9.9), rates, (10.1, 9.9, 10.0))
    return Outcome(system, place, comparison.speed_up.estimate, comparison)


def test_only_what_files_hold_becomes_a_section(tmp_path: Path) -> None:
    files = write_all(tmp_path)
    names = [section.name for section in report_of(files).sections]
    assert names == ["acceptance", "sweep", "serve", "standalone", "plan"]
    assert [section.name for section in report_of(files[2:3]).sections] == ["serve"]


def test_second_file_of_a_kind_becomes_a_section_of_its_own(tmp_path: Path) -> None:
    files = [write_rows(tmp_path / f"{i}.jsonl", "load_point", load_points()) for i in range(2)]
    assert [section.name for section in report_of(files).sections] == ["serve", "serve-2"]


def test_finding_counts_verdicts_of_the_best_setting_and_names_the_best_rival() -> None:
    rival = System("ngram", "n-gram lookup")
    sentence = finding(
        [
            outcome(TWO_TOWER, "maths", (20.0, 20.1, 19.9)),
            outcome(rival, "maths", (30.0, 30.0, 30.0)),
            outcome(TWO_TOWER, "prose", (5.0, 5.0, 5.1)),
            outcome(TWO_TOWER, "code", (10.0, 10.0, 10.0)),
        ]
    )
    assert sentence.startswith("TwoTower pays under 1 of 3 loads: at best 2.00× the speed of no speculation (")
    assert "for maths. It is slower under 1 and no different under 1. " in sentence
    assert sentence.endswith("The best rival there is n-gram lookup with 3.00× (faster).")


def test_finding_claims_no_gain_within_noise_or_without_repeats() -> None:
    noisy = outcome(TWO_TOWER, "maths", (10.05, 10.2, 9.8))
    assert finding([noisy]).startswith("TwoTower gains nothing that can be told from noise: 1.0")
    assert finding([outcome(TWO_TOWER, "maths", (5.0, 5.0, 5.1))]).startswith("TwoTower does not pay: 0.5")
    assert finding([replace(noisy, speed_up=3.0, comparison=None)]).startswith("Whether TwoTower pays is open: 3.00×")
    assert finding([outcome(System("ngram", "n-gram"), "maths", (30.0, 30.0, 30.0))]).startswith("TwoTower was not")


def test_finding_without_repeats_says_what_no_speculation_gives_against_itself() -> None:
    again = Outcome(AGAIN, "maths", 2.5, None)
    assert (
        "3.00× the speed of no speculation (too few repeats for a verdict), where no speculation run again gives 2.50×"
        in (finding([Outcome(TWO_TOWER, "maths", 3.0, None), again]))
    )


def test_speed_and_drafts_stand_in_the_tables(tmp_path: Path) -> None:
    section = section_of(tmp_path, serving_cells())
    speed = cells_of(table(section, "Speed and latency"), "TwoTower")
    assert speed["Verdict"] == "faster" and speed["Different texts"] == "2 of 4"
    plain = cells_of(table(section, "Speed and latency"), "no speculation")
    assert plain["Verdict"] == "" and plain["Speed-up"] == ""
    # 41 drafts accepted in 17 steps, each of 4 drafts and one denoiser pass a round of one request.
    drafts = cells_of(table(section, "What drafts gain"), "TwoTower")
    assert drafts["Acceptance length"].startswith("3.41 (") and drafts["Drafts"] == "4.0"
    assert drafts["Steps with drafts"] == "51 of 51"
    by_position = cells_of(table(section, "Accepted at each position"), "TwoTower")
    assert [by_position[str(i)] for i in (1, 2, 3, 4)] == ["0.88", "0.71", "0.53", "0.29"]
    assert "n-gram lookup" not in {row.cells[0] for row in table(section, "What drafts gain").groups[0].rows}


def test_categories_of_a_load_with_all_prompts_are_told_apart(tmp_path: Path) -> None:
    cells = serving_cells(categories=("all",), concurrencies=(1,))
    lengths = cells_of(table(section_of(tmp_path, cells), "Acceptance length by category"), "TwoTower")
    assert lengths["python"].startswith("4.29 (") and lengths["maths"].startswith("2.80 (")


def test_time_of_a_round_is_the_engines(tmp_path: Path) -> None:
    section = section_of(tmp_path, serving_cells(concurrencies=(1,), speed=1.0))
    times = cells_of(table(section, "Time of a round"), "TwoTower")
    # One step of 10 ms and 5 tokens of half a millisecond; one denoiser pass of one request.
    assert times["Verify ms"] == "12.5" and times["Denoise ms"] == "2.2" and times["Host ms"] == "0.5"


def test_settings_are_sorted_by_speed_and_the_front_is_marked(tmp_path: Path) -> None:
    settings = table(section_of(tmp_path, swept_cells()), "All settings")
    for group in settings.groups:
        rates = [float(row.cells[1].partition(" ")[0]) for row in group.rows]
        assert rates == sorted(rates, reverse=True)
        assert [bool(row.mark) for row in group.rows] == [True] + [False] * (len(rates) - 1)


def test_sweep_draws_a_line_for_each_way_to_draft_over_gamma(tmp_path: Path) -> None:
    section = section_of(tmp_path, swept_cells())
    (plot,) = [one for one in section.plots if one.name == "gamma"]
    lines = [mark for mark in plot.panels[0].marks if isinstance(mark, Line)]
    assert len(plot.panels) == 2 and [line.xs for line in lines] == [(0.5, 0.8, 0.95)] * 2


def test_run_without_a_baseline_is_reported_without_verdicts(tmp_path: Path) -> None:
    for cells in (serving_cells((TWO_TOWER,)), [cell for cell in swept_cells() if cell.system != NONE]):
        section = section_of(tmp_path, cells)
        assert "not measured beside no speculation" in section.finding
        assert "speed-up" not in {plot.name for plot in section.plots}


def test_model_alone_shows_scores_beside_speed(tmp_path: Path) -> None:
    (section,) = report_of([write_standalone(tmp_path / "s.jsonl")]).sections
    found = table(section, "Speed and fidelity")
    assert cells_of(found, "ar")["trio_sums exact_match"] == "0.500 ± 0.100"
    assert cells_of(found, "mask-diffusion S=4 steps=4 gamma=0.95")["Of AR"] == "6.00×"


def test_server_section_has_a_panel_for_each_kind_of_loop(tmp_path: Path) -> None:
    (section,) = report_of([write_rows(tmp_path / "f.jsonl", "load_point", load_points())]).sections
    assert all(len(plot.panels) == 2 for plot in section.plots)
    speed = cells_of(table(section, "Throughput and goodput"), "TwoTower")
    assert speed["Verdict"] == "faster" and speed["Acceptance length"] == "4.00" and speed["Within bound"] == "75 %"


@pytest.mark.parametrize("index", range(5))
def test_rows_have_a_cell_for_every_column_and_plots_names_of_their_own(tmp_path: Path, index: int) -> None:
    (section,) = report_of(write_all(tmp_path)[index : index + 1]).sections
    for one in section.tables:
        assert {len(row.cells) for group in one.groups for row in group.rows} == {len(one.columns)}, one.title
    names = [plot.name for plot in section.plots]
    assert len(names) == len(set(names)) and section.origins and section.tables
