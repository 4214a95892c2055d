"""The report of a quantized model: data, plots and a page."""

from ptq4dit_ao.report.build import Diagnostics, build_report, size_entry, summary
from ptq4dit_ao.report.html import write_html
from ptq4dit_ao.report.plots import image_grid, save_image_grid
from ptq4dit_ao.report.types import EvaluationEntry, Report, WeightBitsEntry

__all__ = [
    "Diagnostics",
    "EvaluationEntry",
    "Report",
    "WeightBitsEntry",
    "build_report",
    "image_grid",
    "save_image_grid",
    "size_entry",
    "summary",
    "write_html",
]
