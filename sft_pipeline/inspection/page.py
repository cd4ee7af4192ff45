"""An inspection as one HTML page that needs nothing else."""

from jinja2 import Environment

from sft_pipeline.inspection.view import Inspection

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Rows token by token</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 64rem; padding: 0 1rem; color: #1b262c; background: #fff }
  h1 { font-size: 1.2rem } h2 { font-size: 1rem; margin: 1.8rem 0 .4rem; overflow-wrap: anywhere } h2 small { font-weight: normal; color: #57656e }
  .row { font: 13px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid #dde3e7; border-radius: 6px; padding: .7rem }
  .t { border-radius: 3px; padding: 1px 0; box-shadow: inset -1px 0 #ffffff }
  .t:hover { outline: 2px solid #1b262c }
  .context { background: #eef1f3; color: #57656e } .supervised { background: #b7e4c7 } .special { background: #e4cdec; color: #6a1b82 }
  .control { font-weight: bold } .ws { opacity: .5 } .cut { color: #c1121f; font-weight: bold }
  .block { display: flex; height: 2.2rem; border: 1px solid #90a0aa; border-radius: 4px; overflow: hidden; background: repeating-linear-gradient(45deg, #fff, #fff 6px, #f1f3f5 6px, #f1f3f5 12px) }
  .segment { border-right: 2px solid #fff; color: #fff; font: 11px/2.2rem ui-monospace, monospace; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; padding-left: 4px; box-sizing: border-box }
  .segment:nth-child(odd) { background: #2d6a4f } .segment:nth-child(even) { background: #457b9d } .segment.shown { background: #9d0208 }
</style></head><body>
<h1>Rows token by token</h1>
<p>{{ title }}. <span class="t supervised">supervised</span> <span class="t special control">control token</span> <span class="t context">context</span>
Hover over a token for its id, its position id and its label.</p>
{% for row in rows %}
<h2>{{ row.row_id }} <small>{{ row.side }}, group {{ row.group }}: {{ row.input_ids | length }} tokens, {{ row.supervised }} supervised, prompt {{ row.prompt_length }}
{%- if row.block is not none %}, block {{ row.block }}{% endif %}</small>
{%- if row.truncated %} <span class="cut">✂ truncated by {{ row.truncated }} tokens</span>{% endif %}</h2>
<div class="row">
{%- for token in row.tokens -%}
{%- set i = loop.index0 -%}
<span class="t {{ row.kind(i) }}{{ ' control' if row.special[i] }}" title="id {{ row.input_ids[i] }} · position {{ i }} · label {{ row.labels[i] }}">{{ show(token) }}</span>
{%- endfor -%}
</div>
{% endfor %}
{% if blocks %}<h1>Packed blocks</h1>{% endif %}
{% for block in blocks %}
<h2>Block {{ block.block }} <small>{{ block.segments | length }} examples, {{ block.length }} of {{ block.max_length }} tokens</small></h2>
<div class="block">
{%- for s in block.segments %}
<div class="segment{{ ' shown' if s.row_id in shown }}" style="width: {{ '%.3f' | format(100 * s.length / block.max_length) }}%" title="{{ s.row_id }} · {{ s.length }} tokens, {{ s.supervised }} supervised · positions 0 to {{ s.length - 1 }}">{{ s.row_id }}</div>
{%- endfor %}
</div>
{% endfor %}
</body></html>
"""


def html_page(inspection: Inspection) -> str:
    """The page. All text of rows is escaped."""
    template = Environment(autoescape=True, keep_trailing_newline=True).from_string(_PAGE)
    return template.render(
        title=inspection.title,
        rows=inspection.rows,
        blocks=inspection.blocks,
        shown={r.row_id for r in inspection.rows},
        show=_show,
    )


def _show(token: str) -> str:
    """White space that would be invisible is written out; a line break still breaks the line."""
    if token and not token.strip():
        return token.replace("\r", "␍").replace("\t", "⇥\t").replace("\n", "⏎\n").replace(" ", "·")
    return token.replace("\n", "⏎\n") or "∅"
