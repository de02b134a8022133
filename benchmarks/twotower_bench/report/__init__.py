"""Reports on what benchmarks measured: one HTML page, and the same figures as JSON."""

from twotower_bench.report.document import Report
from twotower_bench.report.writing import report_of, write_report

__all__ = ["Report", "report_of", "write_report"]
