"""Examination of data before a run: what there is, what is broken, and a page to look at."""

from sclkern.data.check.page import write_page
from sclkern.data.check.report import Finding, Report, Sample
from sclkern.data.check.survey import examine

__all__ = ["Finding", "Report", "Sample", "examine", "write_page"]
