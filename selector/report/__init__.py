"""What people look at before they spend a training budget: tables of a store and its selections, and one HTML page of them."""

from selector.report.build import Evidence, Report, build_report
from selector.report.html import render

__all__ = ["Evidence", "Report", "build_report", "render"]
