"""Rows token by token, for people: which tokens carry loss, and where packed blocks have their boundaries."""

from sft_pipeline.inspection.read import inspect_rows
from sft_pipeline.inspection.render import html_page, print_inspection
from sft_pipeline.inspection.view import BlockView, Inspection, RowView, Segment

__all__ = ["BlockView", "Inspection", "RowView", "Segment", "html_page", "inspect_rows", "print_inspection"]
