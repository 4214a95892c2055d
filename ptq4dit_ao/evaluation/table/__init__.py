"""The comparison of a paper as one command: methods, bits and steps, resumable, as Markdown, JSON and a picture."""

from ptq4dit_ao.evaluation.table.make import make_table
from ptq4dit_ao.evaluation.table.result import TableResult
from ptq4dit_ao.evaluation.table.settings import TableSettings

__all__ = ["TableResult", "TableSettings", "make_table"]
