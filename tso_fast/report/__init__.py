"""Reports on a run, as tables on the terminal and as one HTML file: ``summary -> figures -> page``."""

from tso_fast.report.page import write_report
from tso_fast.report.summary import print_summary

__all__ = ["print_summary", "write_report"]
