"""What happened and why: the report as data, plots and a page."""

from ptq4dit_ao.report.build import Diagnostics, build_report, summary
from ptq4dit_ao.report.html import write_html
from ptq4dit_ao.report.plots import image_grid, save_image_grid

__all__ = ["Diagnostics", "build_report", "image_grid", "save_image_grid", "summary", "write_html"]
