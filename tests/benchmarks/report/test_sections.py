"""Sections of a report on measurements whose answer is known."""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.container import ErrorbarContainer

from tests.benchmarks.report.builders import (
    TWO_TOWER,
    load_points,
    serving_cells,
    swept_cells,
    write_all,
    write_rows,
    write_standalone,
)
from tests.support.serving_cells import AGAIN, NONE
from twotower_bench.records import ServingCell, System
from twotower_bench.report import report_of
from twotower_bench.report.document import Row, Section, Table
from twotower_bench.report.findings import finding, remarks
from twotower_bench.summary import Summary
from twotower_spec.evaluation.statistics import Comparison, Estimate


def section_of(tmp_path: Path, cells: list[ServingCell]) -> Section:
    (section,) = report_of([write_rows(tmp_path / "f.jsonl", "serving_cell", cells)]).sections
    return section


def table(section: Section, title: str) -> Table:
    return next(one for one in section.tables if one.title == title)


def cells_of(found: Table, name: str) -> Row:
    """The first row of that name."""
    return next(row for row in found.rows if row[found.columns[0]] == name)


def lines(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    """Points by the label of their line."""
    handles, labels = axes.get_legend_handles_labels()
    drawn = {label: one for one, label in zip(handles, labels, strict=True) if isinstance(one, ErrorbarContainer)}
    return {label: [(float(x), float(y)) for x, y in one.lines[0].get_xydata()] for label, one in drawn.items()}


def summary(system: System, *rates: float) -> Summary:
    """A system with these rates beside no speculation with 10."""
    comparison = Comparison.of_rates((10.0, 10.1, 9.9), rates, (10.1, 9.9, 10.0)) if len(rates) == 3 else None
    return Summary(
        system=system,
        num_repeats=len(rates),
        num_requests=4,
        tokens_per_s=Estimate(rates[0], rates[0], rates[0]),
        speed_up=comparison.speed_up.value if comparison else rates[0] / 10,
        comparison=comparison,
        num_different=None,
    )


def test_only_what_files_hold_becomes_a_section(tmp_path: Path) -> None:
    files = write_all(tmp_path)
    names = [section.name for section in report_of(files).sections]
    assert names == ["acceptance", "sweep", "serve", "standalone"]
    assert [section.name for section in report_of(files[2:3]).sections] == ["serve"]


def test_second_file_of_a_kind_becomes_a_section_of_its_own(tmp_path: Path) -> None:
    files = [write_rows(tmp_path / f"{i}.jsonl", "load_point", load_points()) for i in range(2)]
    assert [section.name for section in report_of(files).sections] == ["serve", "serve-2"]


def test_finding_is_one_sentence_on_the_best_setting_in_each_place() -> None:
    worse = replace(TWO_TOWER, name="worse", title="TwoTower, worse")
    places = {
        "1 request at a time": [summary(TWO_TOWER, 21.0, 21.1, 20.9), summary(worse, 15.0, 15.1, 14.9)],
        "4 at once": [summary(TWO_TOWER, 15.0, 15.0, 15.1)],
        "8 at once": [summary(TWO_TOWER, 10.0, 10.0, 10.0)],
        "16 at once": [summary(TWO_TOWER, 5.0, 5.0, 5.1)],
    }
    assert finding(places) == (
        "At 1 request at a time and 4 at once TwoTower is 1.5 to 2.1 times as fast as no speculation; at 8 at once "
        "there is no difference beyond noise; at 16 at once it is slower, 0.50 times as fast as no speculation."
    )
    assert finding({"8 at once": places["8 at once"]}) == (
        "At 8 at once there is no difference beyond noise between TwoTower and no speculation."
    )


def test_places_of_one_verdict_are_said_in_few_words() -> None:
    faster = [summary(TWO_TOWER, 15.0, 15.0, 15.1)]
    places = {f"{number} at once": faster for number in (2, 4, 8)}
    assert finding(places).startswith("At 2, 4 and 8 at once TwoTower is 1.50 times as fast")
    more = {**places, "16 at once": faster, "32 at once": faster}
    assert finding(more).startswith("Under 5 of 5 loads TwoTower is 1.50 times as fast")


def test_remarks_name_the_best_with_its_doubts_and_the_best_rival() -> None:
    rival = System("ngram", "n-gram lookup")
    best, other = remarks(
        {
            "8 at once": [summary(TWO_TOWER, 20.0, 20.1, 19.9), summary(rival, 30.0, 30.0, 30.0)],
            "4 at once": [summary(TWO_TOWER, 5.0, 5.0, 5.1)],
        }
    )
    assert best.startswith("Best: 2.00× at 8 at once (lowest to highest ") and "A/A noise 1.0" in best
    assert other == "The best rival there is n-gram lookup with 3.00× (faster)."


def test_finding_claims_no_gain_within_noise_or_without_repeats() -> None:
    assert "no difference" in finding({"maths": [summary(TWO_TOWER, 10.05, 10.2, 9.8)]})
    assert "TwoTower is slower, 0.50 times as fast" in finding({"maths": [summary(TWO_TOWER, 5.0, 5.0, 5.1)]})
    unknown = finding({"maths": [summary(TWO_TOWER, 30.0)]})
    assert "was 3.0 times as fast as no speculation, which takes 3 repeats and an A/A run to tell from noise" in unknown
    assert finding({"maths": [summary(System("ngram", "n-gram"), 30.0)]}).startswith("TwoTower was not")


def test_without_repeats_it_is_said_what_no_speculation_gives_against_itself() -> None:
    assert remarks({"maths": [summary(TWO_TOWER, 30.0), summary(AGAIN, 25.0)]}) == [
        "Best: 3.00× at maths; no speculation run again gives 2.50× there."
    ]


def test_speed_and_drafts_stand_in_the_tables(tmp_path: Path) -> None:
    section = section_of(tmp_path, serving_cells())
    speed = cells_of(table(section, "Speed and latency"), "TwoTower")
    assert speed["Verdict"] == "faster" and speed["Different texts"] == "4 of 8"
    plain = cells_of(table(section, "Speed and latency"), "no speculation")
    assert plain["Verdict"] == "" and plain["Speed-up"] == ""
    # In each category 41 drafts accepted in 17 steps, each of 4 drafts and one denoiser pass a round of one request.
    drafts = cells_of(table(section, "What drafts gain"), "TwoTower")
    assert drafts["Acceptance length"].startswith("3.41 (") and drafts["Drafts"] == "4.0"
    assert drafts["Steps with drafts"] == "102 of 102"
    by_position = cells_of(table(section, "Accepted at each position"), "TwoTower")
    assert [by_position[str(i)] for i in (1, 2, 3, 4)] == ["0.88", "0.71", "0.53", "0.29"]
    assert "n-gram lookup" not in {row["System"] for row in table(section, "What drafts gain").rows}


def test_categories_of_a_load_with_all_prompts_are_told_apart(tmp_path: Path) -> None:
    cells = serving_cells(categories=("all",), concurrencies=(1,))
    lengths = cells_of(table(section_of(tmp_path, cells), "Acceptance length by category"), "TwoTower")
    assert lengths["python"].startswith("4.29 (") and lengths["maths"].startswith("2.80 (")


def test_time_of_a_round_is_the_engines_beside_a_step_without_speculation(tmp_path: Path) -> None:
    cells = serving_cells(concurrencies=(1,), speed=1.0)
    found = table(section_of(tmp_path, cells), "Time of a round")
    times = cells_of(found, "TwoTower")
    # 17 steps of 12.5 ms, and 4 that read a prompt, of 14.5 ms; one denoiser pass of one request.
    assert times["Verify ms"] == "12.9" and times["Denoise ms"] == "2.2" and times["Host ms"] == "0.5"
    own = [cell for cell in cells if cell.system == TWO_TOWER]
    rounds = sum(cell.drafting.rounds for cell in own if cell.drafting)
    phases = [float(times[f"{phase} ms"]) for phase in ("Extend", "Denoise", "Host", "Verify")]
    assert sum(phases) == pytest.approx(1e3 * sum(cell.seconds for cell in own) / rounds, abs=0.2)  # rounded to 0.1
    # 13 steps of 10.5 ms after one of 14.5 ms that reads the prompt, in the categories and in all together.
    assert list(found.groups) == ["all prompts, 1 at once", "maths, 1 at once", "python, 1 at once"]
    assert {row["Plain step ms"] for row in found.rows} == {f"{(13 * 10.5 + 14.5) / 14:.1f}"}


def test_all_categories_lead_and_the_finding_is_about_them(tmp_path: Path) -> None:
    section = section_of(tmp_path, serving_cells())
    headings = list(table(section, "Speed and latency").groups)
    assert [heading.partition(";")[0] for heading in headings[:3]] == [
        "all prompts, 1 at once", "all prompts, 4 at once", "maths, 1 at once"
    ]  # fmt: skip
    assert headings[0].startswith("all prompts, 1 at once; 8 prompts; A/A noise 1.") and "; 4 prompts; " in headings[2]
    assert table(section, "Acceptance length by category").columns == ["System", "all prompts", "maths", "python"]
    assert section.finding.startswith("At 1 request at a time and 4 at once TwoTower is 1.8 to 2.7 times as fast")
    # Confidences are counted once, not again in all together: 3 repeats, 2 categories, 2 concurrencies.
    confidences = table(section, "Confidence and acceptance")
    assert sum(int(row["Drafts"]) for row in confidences.rows) == 260 * 12


def test_run_that_was_stopped_is_taken_together_only_where_every_category_was_measured(tmp_path: Path) -> None:
    whole = [cell for cell in serving_cells() if (cell.repeat, cell.load.category) != (2, "python")]
    section = section_of(tmp_path, [cell for cell in whole if (cell.system, cell.load.category) != (AGAIN, "python")])
    heading, rows = next(iter(table(section, "Speed and latency").groups.items()))
    assert heading == "all prompts, 1 at once; 8 prompts"
    assert [row["System"] for row in rows] == ["no speculation", "n-gram lookup", "TwoTower"]
    # Of 2 repeats, as those of no category are left over.
    assert cells_of(table(section, "What drafts gain"), "TwoTower")["Steps with drafts"] == "68 of 68"
    together, maths, *_ = table(section, "Accepted at each position").groups.values()
    assert together[0] == maths[0]


def test_intervals_of_few_repeats_are_called_what_they_are(tmp_path: Path) -> None:
    section = section_of(tmp_path, serving_cells())
    for text in (table(section, "Speed and latency").note, section.plot.caption):
        assert "(lowest to highest)" in text and "95 %" not in text
    more = [replace(cell, repeat=cell.repeat + 3) for cell in serving_cells()]
    assert "(95 % interval)" in table(section_of(tmp_path, [*serving_cells(), *more]), "Speed and latency").note


def test_positions_that_few_steps_reached_are_left_empty(tmp_path: Path) -> None:
    cells = serving_cells(categories=("maths",), concurrencies=(1,))
    title = "Accepted at each position that was reached"
    # In a repeat 17, 15, 12 and 9 steps drafted there and accepted all before.
    assert cells_of(table(section_of(tmp_path, cells), title), "TwoTower") == {
        "System": "TwoTower", "1": "0.88", "2": "0.80", "3": "0.75", "4": "0.56"
    }  # fmt: skip
    # Of two requests 8, 7, 5 and 4: 12 in all repeats, whose texts are the same.
    short = section_of(tmp_path, [replace(cell, requests=cell.requests[2:]) for cell in cells])
    assert table(short, title).columns == ["System", "1", "2", "3"]
    # Of one request 3.
    one = section_of(tmp_path, [replace(cell, requests=cell.requests[2:3]) for cell in cells])
    assert title not in {found.title for found in one.tables}


def test_rounds_without_drafts_for_no_good_reason_are_told(tmp_path: Path) -> None:
    reasons = {"policy": 7, "limit": 3, "prefilling": 2}
    for more, text in (({}, None), ({"no room": 5, "not finite": 1}, "(no room: 60 and not finite: 12)")):
        cells = [
            replace(cell, drafting=replace(cell.drafting, without_drafts={**reasons, **more}))
            if cell.drafting
            else cell
            for cell in serving_cells()
        ]
        notes = [note for note in section_of(tmp_path, cells).notes if "went without drafts" in note]
        assert (notes == []) if text is None else text in notes[0]


def test_settings_are_sorted_by_speed_and_the_front_is_marked(tmp_path: Path) -> None:
    settings = table(section_of(tmp_path, swept_cells()), "All settings")
    for rows in settings.groups.values():
        rates = [float(row["Tokens/s"].partition(" ")[0]) for row in rows]
        assert rates == sorted(rates, reverse=True)
        assert [bool(row["Pareto"]) for row in rows] == [True] + [False] * (len(rates) - 1)


def test_best_of_many_settings_is_called_so_in_the_finding(tmp_path: Path) -> None:
    chosen = "it is the best of 7 settings, so measure it anew to confirm."
    assert section_of(tmp_path, swept_cells()).notes[0].endswith(chosen)
    assert "best of" not in section_of(tmp_path, serving_cells()).notes[0]


def test_speed_of_one_user_is_the_same_in_all_tables(tmp_path: Path) -> None:
    section = section_of(tmp_path, swept_cells())
    front = {
        (row["System"], row["Load"]): row["Tokens/s of one user"].partition(" ")[0]
        for row in table(section, "Pareto front").rows
    }
    users = {
        (row["System"], heading.partition(";")[0]): row["Of one user"]
        for heading, rows in table(section, "All settings").groups.items()
        for row in rows
        if row["Pareto"]
    }
    assert front and users == front


def test_every_setting_stands_in_the_table_under_every_concurrency(tmp_path: Path) -> None:
    cells = [cell for number in range(1, 7) for cell in swept_cells((number,))]
    settings = table(section_of(tmp_path, cells), "All settings")
    assert [heading.partition(",")[2].partition(";")[0] for heading in settings.groups] == [
        f" {number} at once" for number in range(1, 7)
    ]
    # 7 settings, no speculation and the same again.
    assert all(len({row["System"] for row in rows}) == len(rows) == 9 for rows in settings.groups.values())
    assert all(row["Of one user"] for row in settings.rows if not row["System"].startswith("no"))


def test_plot_shows_the_speed_ups_of_the_table_by_system_and_load_with_the_noise(tmp_path: Path) -> None:
    section = section_of(tmp_path, serving_cells(categories=("maths",), concurrencies=(1, 4)))
    (axes,) = section.plot.panels
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "4"]
    drawn = lines(axes)
    assert list(drawn) == ["n-gram lookup", "TwoTower"]
    for system, points in drawn.items():
        rows = [row for row in table(section, "Speed and latency").rows if row["System"] == system]
        assert [x for x, _ in points] == [0, 1]
        assert [f"{y:.2f}×" for _, y in points] == [row["Speed-up"].partition(" ")[0] for row in rows]
    floors = [one.comparison.noise_floor for one in section.figures if one.system == TWO_TOWER]
    bands = [band.get_paths()[0].get_extents() for band in axes.collections if isinstance(band, PolyCollection)]
    assert [(band.x0, band.x1) for band in bands] == [(-0.5, 0.5), (0.5, 1.5)]
    assert [(band.y0, band.y1) for band in bands] == [pytest.approx((1 / floor, floor)) for floor in floors]


def test_plot_of_one_load_stands_by_kind_of_prompts(tmp_path: Path) -> None:
    (axes,) = section_of(tmp_path, serving_cells(concurrencies=(4,))).plot.panels
    assert axes.get_title(loc="left") == "4 at once"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["all prompts", "maths", "python"]
    assert {line.get_linestyle() for line in axes.get_lines() if line.get_label() != "no speculation"} == {"None"}


@pytest.mark.parametrize("num_kinds", [2, 8])
def test_names_of_kinds_of_prompts_do_not_run_into_each_other(tmp_path: Path, num_kinds: int) -> None:
    categories = ("writing", "roleplay", "reasoning", "mathematics", "coding", "extraction", "stem", "humanities")
    (axes,) = section_of(tmp_path, serving_cells(categories=categories[:num_kinds], concurrencies=(1,))).plot.panels
    axes.figure.canvas.draw()
    labels = [label for label in axes.get_xticklabels() if label.get_text()]
    assert len(labels) == num_kinds + 1
    for one, other in pairwise(labels):
        box, next_box = one.get_window_extent(), other.get_window_extent()
        angle = math.radians(one.get_rotation())
        height = one.get_fontsize() * axes.figure.dpi / 72
        assert box.x1 < next_box.x0 or (next_box.x1 - box.x1) * math.sin(angle) > height


def test_settings_that_differ_in_gamma_alone_stand_side_by_side(tmp_path: Path) -> None:
    section = section_of(tmp_path, swept_cells())
    settings = [row for rows in table(section, "All settings").groups.values() for row in rows]
    for title, name, num_places in (("Speed-up", "Speed-up", 2), ("Acceptance length", "Acceptance length", 1)):
        found = table(section, f"{title} over gamma")
        assert found.columns == ["Setting", "0.5", "0.8", "0.95"] and len(found.groups) == num_places
        # The setting with a fixed policy has no gamma.
        assert [len(rows) for rows in found.groups.values()] == [2] * num_places
        shown = {row[gamma] for row in found.rows for gamma in found.columns[1:]}
        assert shown <= {row[name] for row in settings}
    (alone,) = report_of([write_standalone(tmp_path / "s.jsonl")]).sections
    speeds = table(alone, "Of AR over gamma")
    assert speeds.rows == [{"Setting": "S=4 steps=4", "0.5": "4.00×", "0.8": "5.00×", "0.95": "6.00×"}]
    fixed = table(section_of(tmp_path, serving_cells()), "Speed and latency")
    assert fixed.rows and not any("gamma" in one.title for one in section_of(tmp_path, serving_cells()).tables)


def test_run_without_a_baseline_is_reported_without_verdicts(tmp_path: Path) -> None:
    for cells in (serving_cells((TWO_TOWER,)), [cell for cell in swept_cells() if cell.system != NONE]):
        section = section_of(tmp_path, cells)
        assert section.finding == "TwoTower was not compared with no speculation here."
        assert section.plot.panels == []


def test_model_alone_shows_scores_beside_speed(tmp_path: Path) -> None:
    (section,) = report_of([write_standalone(tmp_path / "s.jsonl")]).sections
    found = table(section, "Speed and fidelity")
    assert cells_of(found, "ar")["trio_sums exact_match"] == "0.500 ± 0.100"
    truest = cells_of(found, "mask-diffusion S=4 steps=4 gamma=0.95")
    assert truest["Of AR"] == "6.00×"
    # 0.1, 0.5 and 0.4 s in each of two repeats, for 2 texts of 4 tokens.
    assert [truest[f"{phase} ms"] for phase in ("Prefill", "Denoise", "Extend")] == ["12.50", "62.50", "50.00"]


def test_model_alone_shows_speed_against_fidelity_and_what_nothing_beats(tmp_path: Path) -> None:
    (section,) = report_of([write_standalone(tmp_path / "s.jsonl")]).sections
    (axes,) = section.plot.panels
    drawn = lines(axes)
    assert drawn["Pareto front"] == [(pytest.approx(6.0), 1.0)] == [max(drawn["mask-diffusion"])]
    assert set(drawn) == {"Pareto front", "ar", "mock-ar", "self-speculative", "mask-diffusion"}


def test_server_section_has_a_panel_for_each_kind_of_loop(tmp_path: Path) -> None:
    (section,) = report_of([write_rows(tmp_path / "f.jsonl", "load_point", load_points())]).sections
    assert [axes.get_title(loc="left") for axes in section.plot.panels] == ["closed loop", "open loop"]
    speed = cells_of(table(section, "Throughput and goodput"), "TwoTower")
    assert speed["Verdict"] == "faster" and speed["Acceptance length"] == "4.00" and speed["Within bound"] == "75 %"


def test_worst_repeat_is_told_where_it_keeps_the_bound_less_often(tmp_path: Path) -> None:
    points = [replace(point, num_good=1) if point.repeat == 1 else point for point in load_points()]
    (section,) = report_of([write_rows(tmp_path / "f.jsonl", "load_point", points)]).sections
    assert cells_of(table(section, "Throughput and goodput"), "TwoTower")["Within bound"] == "74 % (lowest 25 %)"


@pytest.mark.parametrize("index", range(4))
def test_rows_have_names(tmp_path: Path, index: int) -> None:
    (section,) = report_of(write_all(tmp_path)[index : index + 1]).sections
    for one in section.tables:
        assert all(row[one.columns[0]] for row in one.rows), one.title
    assert section.origins and section.tables
