"""Section of `bench standalone`: mask diffusion by the model alone, its speed and its fidelity to AR."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from twotower_bench.pareto import pareto_front
from twotower_bench.report.document import Axis, Bars, Line, Mark, Panel, Plot, Reference, Row, RowGroup, Section, Table
from twotower_bench.report.gamma import GAMMAS, GammaPoint, families_of, gamma_lines, joined_in_words
from twotower_bench.report.reading import Measurements, Score
from twotower_bench.report.wording import interval, number, share, spread, times
from twotower_spec.errors import ArgumentError
from twotower_spec.evaluation.settings import Setting
from twotower_spec.evaluation.standalone import AR, BASELINES, Cell, Figures, summarise

MOST_BARS = 14
FIDELITY = Axis("share of texts that are AR's", limits=(-0.03, 1.05))
LAYERS = (("prefill", 4), ("denoise", 2), ("extend", 1))


def standalone_section(measured: Measurements, name: str) -> Section:
    """Of its cells and scores.

    Args:
        measured: with at least one cell.
        name: of the section.

    Raises:
        ArgumentError: AR was not measured in any repeat with others, and all is compared with it.
    """
    figures = summarise(measured.cells)
    if not figures:
        raise ArgumentError(f"{measured.source} has no cell of AR, which all is compared with; let its run finish")
    front = _front(figures)
    repeats = 1 + max(cell.repeat for cell in measured.cells)
    return Section(
        name,
        "The model alone",
        _finding(figures),
        tuple(measured.origins),
        (_table(figures, front, measured.scores),),
        (_fidelity_plot(figures, front), *_gamma_plot(figures), _phase_plot(measured.cells, front)),
        (f"Greedy, one prompt at a time, {repeats} repeats. AR is the context tower's own text.",),
        [
            *({**asdict(one), "label": one.setting.label} for one in figures),
            *({"setting": asdict(one.setting), **asdict(one.score)} for one in measured.scores),
        ],
    )


def _is_diffusion(one: Figures) -> bool:
    return one.setting.mode == "mask-diffusion"


def _front(figures: Sequence[Figures]) -> list[Figures]:
    """What nothing beats in both speed and texts that are AR's."""
    return [figures[i] for i in pareto_front([(one.speed_up, one.identical.value) for one in figures])]


def _finding(figures: Sequence[Figures]) -> str:
    diffusion = [one for one in figures if _is_diffusion(one)]
    if not diffusion:
        return "Mask diffusion was not measured."
    fastest = max(diffusion, key=lambda one: one.speed_up)
    truest = max(diffusion, key=lambda one: (one.identical.value, one.speed_up))
    sentence = (
        f"Mask diffusion alone is at best {times(fastest.speed_up)} as fast as AR ({fastest.setting.label}), with "
        f"{share(fastest.identical.value)} of the texts AR's to the token"
    )
    if truest is not fastest:
        sentence += (
            f"; most faithful is {truest.setting.label}: {share(truest.identical.value)} at {times(truest.speed_up)}"
        )
    own = next((one for one in figures if one.setting.mode == "self-speculative"), None)
    return sentence + (f". Self-speculation reaches {times(own.speed_up)}." if own else ".")


def _table(figures: Sequence[Figures], front: Sequence[Figures], scores: Sequence[Score]) -> Table:
    tasks = list(dict.fromkeys((one.score.task, one.score.metric) for one in scores))

    def row(one: Figures) -> Row:
        cells = (
            one.setting.label,
            spread(one.tokens_per_s),
            "" if one.setting == AR else times(one.speed_up),
            interval(one.tokens_per_nfe),
            interval(one.tokens_per_context_pass),
            f"{share(one.identical.value)} ({share(one.identical.low)} to {share(one.identical.high)})",
            number(one.common_prefix.value, 1),
            number(one.length, 1),
            *(_score(scores, one.setting, task) for task in tasks),
        )
        return Row(cells, "Pareto" if one in front else "")

    baselines = [one for one in figures if one.setting in BASELINES]
    others = sorted((one for one in figures if one.setting not in BASELINES), key=lambda one: -one.speed_up)
    columns = (
        "Setting", "Tokens/s", "Of AR", "Tokens / NFE", "Tokens / context pass", "Same text", "Common prefix", "Length",
        *(f"{task} {metric}" for task, metric in tasks),
    )  # fmt: skip
    note = (
        "Tokens/s: median of the repeats (quartiles). NFE: denoiser passes. Same text: share of prompts whose text is "
        "AR's to the token; common prefix: leading tokens that are AR's. Intervals: 95 % over prompts. Pareto: nothing "
        "is both faster and more often the same."
    )
    groups = (
        RowGroup("Baselines", tuple(map(row, baselines))),
        RowGroup("Mask diffusion, fastest first", tuple(map(row, others))),
    )
    return Table("Speed and fidelity", columns, tuple(group for group in groups if group.rows), note)


def _score(scores: Sequence[Score], setting: Setting, task: tuple[str, str]) -> str:
    for one in scores:
        if one.setting == setting and (one.score.task, one.score.metric) == task:
            error = "" if one.score.standard_error is None else f" ± {one.score.standard_error:.3f}"
            return f"{one.score.value:.3f}{error}"
    return ""


def _fidelity_plot(figures: Sequence[Figures], front: Sequence[Figures]) -> Plot:
    def line(label: str, hue: int, points: Sequence[Figures], is_connected: bool = False) -> Line:
        ys = tuple(one.identical.value for one in points)
        return Line(label, hue, tuple(one.speed_up for one in points), ys, is_connected=is_connected)

    marks = (
        line("Pareto front", 6, front, is_connected=True),
        line("mask diffusion", 1, [one for one in figures if _is_diffusion(one)]),
        *(line(one.setting.mode, hue, [one]) for hue, one in zip((0, 2, 3), _baselines(figures), strict=False)),
    )
    return Plot(
        "fidelity",
        "Speed against fidelity",
        "Every setting: speed over AR in the same repeat, and how often the text is AR's to the token.",
        "Up and to the right is better; the line joins what nothing beats in both.",
        (Panel("", Axis("speed, AR = 1"), FIDELITY, marks),),
    )


def _baselines(figures: Sequence[Figures]) -> list[Figures]:
    return [one for one in figures if one.setting in BASELINES]


def _gamma_plot(figures: Sequence[Figures]) -> list[Plot]:
    """Speed and fidelity over gamma, none where gamma does not vary."""
    points = [
        GammaPoint(
            f"S={one.setting.block_size} steps={one.setting.steps_per_block}",
            one.setting.confidence_threshold,
            one.speed_up,
            {"speed": one.speed_up, "fidelity": one.identical.value},
        )
        for one in figures
        if _is_diffusion(one) and one.setting.confidence_threshold is not None
    ]
    families = families_of(points)
    if not families:
        return []
    speed: tuple[Mark, ...] = (Reference("AR", 1.0), *gamma_lines(points, families, "speed"))
    fidelity = tuple(gamma_lines(points, families, "fidelity"))
    return [
        Plot(
            "gamma",
            "Speed and fidelity over gamma",
            joined_in_words(families),
            "A higher gamma commits fewer tokens a pass: slower, and more often AR's text.",
            (Panel("speed", GAMMAS, Axis("speed, AR = 1"), speed), Panel("fidelity", GAMMAS, FIDELITY, fidelity)),
        )
    ]


def _phase_plot(cells: Sequence[Cell], front: Sequence[Figures]) -> Plot:
    """Milliseconds per token by phase: baselines, and the front."""
    settings = list(dict.fromkeys([*BASELINES, *(one.setting for one in reversed(front))]))
    by_setting = {setting: [cell for cell in cells if cell.setting == setting] for setting in settings}
    shown = [setting for setting in settings if by_setting[setting]][:MOST_BARS]

    def per_token(setting: Setting, phase: str) -> float:
        own = by_setting[setting]
        return 1e3 * sum(cell.phase_seconds[phase] for cell in own) / sum(cell.num_tokens for cell in own)

    marks = tuple(Bars(phase, hue, tuple(per_token(setting, phase) for setting in shown)) for phase, hue in LAYERS)
    names = tuple(setting.label.replace("mask-diffusion ", "") for setting in shown)
    return Plot(
        "phases",
        "Time per token by phase",
        "Of the baselines and the Pareto front, over all repeats.",
        "Shorter is better; the longest part of a bar is what there is to gain.",
        (Panel("", Axis("milliseconds per token"), Axis("", names=names), marks),),
    )
