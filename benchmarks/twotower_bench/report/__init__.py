"""Reports on what benchmarks measured: one HTML file, and the same as Markdown, JSON and PNG."""

from twotower_bench.report.document import Report
from twotower_bench.report.writing import report_of, write_report

__all__ = ["Report", "report_of", "write_report"]
