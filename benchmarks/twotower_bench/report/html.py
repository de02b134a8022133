"""A report as one HTML file that needs nothing else."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from twotower_bench.report.document import Mark, Plot, Report, Section
from twotower_bench.report.legend import swatch
from twotower_bench.report.palette import DARK, LIGHT, css_variables
from twotower_bench.report.plots import svg_of

VERDICTS = {"faster": "faster", "slower": "slower", "no difference": "same"}


def html_of(report: Report) -> str:
    """The whole page."""
    environment = Environment(
        loader=PackageLoader("twotower_bench.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("template.html.j2")
    return template.render(
        report=report,
        light=Markup(css_variables(LIGHT)),
        dark=Markup(css_variables(DARK)),
        svgs=_svgs,
        swatch=_swatch,
        verdicts=VERDICTS,
    )


def _svgs(section: Section, plot: Plot) -> list[Markup]:
    """Drawn by us: labels were escaped as they were drawn."""
    return [Markup(svg_of(plot, index, section.file_name(plot))) for index in range(len(plot.panels))]


def _swatch(mark: Mark) -> Markup:
    return Markup(swatch(mark))
