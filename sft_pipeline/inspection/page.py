"""An inspection as one HTML page that needs nothing else."""

from pathlib import Path

from jinja2 import Environment

from sft_pipeline.inspection.view import Inspection, visible

_PAGE = Path(__file__).with_name("page.jinja")


def html_page(inspection: Inspection) -> str:
    """The page. All text of rows is escaped."""
    environment = Environment(autoescape=True, keep_trailing_newline=True)
    environment.filters["visible"] = visible
    return environment.from_string(_PAGE.read_text(encoding="utf-8")).render(
        title=inspection.title,
        rows=inspection.rows,
        blocks=inspection.blocks,
        shown={(r.side, r.row_id) for r in inspection.rows},
        cuts=any(r.cut_before or r.cut_after for r in inspection.rows),
    )
