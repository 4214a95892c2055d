"""Comparison of methods at several bit widths and step counts, resumable, written as Markdown, JSON and a chart."""

from ptq4dit_ao.evaluation.table.make import make_table
from ptq4dit_ao.evaluation.table.result import TableResult
from ptq4dit_ao.evaluation.table.settings import TableSettings

__all__ = ["TableResult", "TableSettings", "make_table"]
