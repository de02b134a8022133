"""Speed and latency of systems in vLLM, beside no speculation and its noise."""

from __future__ import annotations

from collections.abc import Sequence

from twotower_bench.records import BASELINE, System
from twotower_bench.report.document import Axis, Band, Line, Mark, Panel, Plot, Reference, Row, Table
from twotower_bench.report.findings import Outcome
from twotower_bench.report.wording import (
    category_in_words,
    dodged,
    groups_by_load,
    hues_of,
    interval,
    intervals_of,
    milliseconds,
    num_of,
    number,
    place_of,
    speed_up,
    spread,
)
from twotower_bench.summary import CellSummary


def outcomes_of(figures: Sequence[CellSummary]) -> list[Outcome]:
    """Of all systems that were compared with no speculation."""
    return [
        Outcome(one.system, place_of(one.load), one.speed_up, one.comparison)
        for one in figures
        if one.speed_up is not None and one.system.name != BASELINE
    ]


def speed_table(figures: Sequence[CellSummary]) -> Table:
    """Throughput, verdict and latency, loads apart."""
    rows = [
        Row(
            (
                one.system.title,
                spread(one.tokens_per_s),
                "" if one.system.name == BASELINE else speed_up(one.speed_up, one.comparison),
                "" if one.verdict == "-" else one.verdict,
                milliseconds(one.latency.first_token, one.latency.first_token_p99),
                milliseconds(one.latency.gap, one.latency.gap_p99),
                "" if one.system.name == BASELINE else num_of(one.num_different, one.num_requests),
            )
        )
        for one in figures
    ]
    columns = ("System", "Tokens/s", "Speed-up", "Verdict", "TTFT ms", "ITL ms", "Different texts")
    note = (
        f"Tokens/s: median of the repeats (quartiles). Speed-up: over no speculation in the same repeat, the median"
        f"{intervals_of(figures)}; “no difference” where it is within the noise of no speculation against itself. "
        "TTFT: to the first token; ITL: between outputs; median / 99th percentile. Different texts: prompts whose text "
        "is not that of no speculation."
    )
    return Table("Speed and latency", columns, groups_by_load(figures, rows, with_noise=True), note)


def drafts_table(figures: Sequence[CellSummary]) -> Table:
    """What drafts gain, loads apart; systems that drafted."""
    drafted = [one for one in figures if one.acceptance.acceptance_length]
    rows = [
        Row(
            (
                one.system.title,
                interval(one.acceptance.acceptance_length),
                interval(one.acceptance.tokens_per_step),
                number(one.tokens_per_nfe),
                number(one.acceptance.mean_draft_tokens, 1),
                num_of(one.acceptance.num_drafted_steps, one.acceptance.num_steps),
            )
        )
        for one in drafted
    ]
    columns = ("System", "Acceptance length", "Tokens / step", "Tokens / NFE", "Drafts", "Steps with drafts")
    note = (
        "Acceptance length: accepted drafts + 1 per step that verified drafts, with its 95 % interval over prompts. "
        "Tokens / step counts the steps without drafts, too. Tokens / NFE: of steps with drafts per denoiser pass, "
        "requests counted separately. Drafts: verified per step that had any. The last step of a text counts as far as "
        "the text goes."
    )
    return Table("What drafts gain", columns, groups_by_load(drafted, rows), note)


def speed_up_plots(figures: Sequence[CellSummary], systems: Sequence[System]) -> list[Plot]:
    """Speed-up of some systems against concurrency, or by category where there is one concurrency alone.

    None where no speculation was not measured.
    """
    hues = hues_of(systems)
    known = [one for one in figures if one.system.name in hues and one.speed_up is not None]
    if not known:
        return []
    concurrencies = tuple(sorted({one.load.concurrency for one in known}))
    reading = "Only what lies outside the grey band (A/A: no speculation against itself) can be told from noise."
    if not any(one.comparison for one in known):
        reading = "With fewer than three repeats nothing here can be told from noise."
    caption = (
        f"Tokens per second over those of no speculation in the same repeat, the median of the repeats"
        f"{intervals_of(known)}."
    )
    if len(concurrencies) == 1:
        panel = _panel_of_kinds(known, hues)
        return [Plot("speed-up", f"Speed-up at {concurrencies[0]} at once", caption, reading, (panel,))]
    panels = tuple(
        _panel_of_concurrencies([one for one in known if _kind(one) == kind], hues, kind)
        for kind in dict.fromkeys(map(_kind, known))
    )
    return [Plot("speed-up", "Speed-up against concurrency", caption, reading, panels)]


def _kind(one: CellSummary) -> str:
    """Its load without the concurrency, in words."""
    temperature = f", temperature {one.load.temperature:g}" if one.load.temperature else ""
    return category_in_words(one.load.category) + temperature


def _panel_of_concurrencies(known: Sequence[CellSummary], hues: dict[str, int], title: str) -> Panel:
    xs = [float(one.load.concurrency) for one in known]
    noise = {x: one.comparison.noise_floor for x, one in zip(xs, known, strict=True) if one.comparison}
    marks = _noise([(x, floor) for x, floor in sorted(noise.items())])
    for name, hue in hues.items():
        own = sorted((one for one in known if one.system.name == name), key=lambda one: one.load.concurrency)
        if own:
            marks.append(_line(own, hue, [one.load.concurrency for one in own], is_connected=True))
    axis = Axis("requests at once", ticks=tuple(sorted(set(xs))), is_logarithmic=True)
    return Panel(title, axis, Axis("speed-up"), tuple(marks))


def _panel_of_kinds(known: Sequence[CellSummary], hues: dict[str, int]) -> Panel:
    kinds = list(dict.fromkeys(map(_kind, known)))
    noise = {kinds.index(_kind(one)): one.comparison.noise_floor for one in known if one.comparison}
    marks = _noise([(place + half, floor) for place, floor in sorted(noise.items()) for half in (-0.45, 0.45)])
    for index, (name, hue) in enumerate(hues.items()):
        own = [one for one in known if one.system.name == name]
        places = [kinds.index(_kind(one)) + dodged(index, len(hues)) for one in own]
        if own:
            marks.append(_line(own, hue, places, is_connected=False))
    return Panel("", Axis("", names=tuple(kinds)), Axis("speed-up"), tuple(marks))


def _noise(floors: Sequence[tuple[float, float]]) -> list[Mark]:
    reference = Reference("no speculation", 1.0)
    if not floors:
        return [reference]
    xs, high = zip(*floors, strict=True)
    return [Band("A/A noise", xs, tuple(1 / floor for floor in high), high), reference]


def _line(own: Sequence[CellSummary], hue: int, xs: Sequence[float], is_connected: bool) -> Line:
    """Intervals only where all points have one."""
    ratios = [one.comparison.speed_up for one in own if one.comparison]
    ends = ratios if len(ratios) == len(own) else []
    return Line(
        own[0].system.title,
        hue,
        tuple(xs),
        tuple(one.value for one in ends) or tuple(one.speed_up or 0.0 for one in own),
        tuple(one.low for one in ends),
        tuple(one.high for one in ends),
        is_connected,
    )
