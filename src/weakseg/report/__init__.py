"""The report: one self-contained HTML page per run."""

from weakseg.report.page import write_report

__all__ = ["write_report"]
