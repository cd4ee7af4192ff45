"""`sft diff`: two models side by side."""

from typing import Any

from rich.console import Console
from rich.text import Text

from sft_pipeline.cli.console import printable
from sft_pipeline.cli.model import find_model
from sft_pipeline.cli.sizes import plural, table_of
from sft_pipeline.inventory.diff import compare
from sft_pipeline.store import Store

SHOWN = 10  # rows of each kind; --json has all
LONGEST = 60  # characters of a value
SHORT = 12


def diff_models(model_a: str, model_b: str, *, console: Console, out: Console | None) -> dict[str, Any]:
    """The JSON of the command; also prints to `out`.

    Raises:
        InputError: One of the models is not there.
    """
    store = Store()
    a, b = find_model(model_a, store), find_model(model_b, store)
    with console.status("comparing"):
        result = compare(a, b, store)
    if out is not None:
        show_diff(result, out)
    return result


def show_diff(result: dict[str, Any], console: Console) -> None:
    """What differs, in the order in which one looks: scores, rows, template, recipe, the rest."""
    for name in ("a", "b"):
        m = result[name]
        console.print(
            f"{name}: {m['recipe']}@{m['snapshot']} ({m['fingerprint'][:SHORT]}), step {m['step']}",
            highlight=False,
        )
    if result["a"]["fingerprint"] == result["b"]["fingerprint"]:
        console.print("both are the same model", style="yellow")
        return
    _show_metrics(result["metrics"], console)
    _show_rows(result, console)
    template = result["template"]
    if template["same"] is None:
        console.print("chat template: not at hand")
    elif template["same"]:
        console.print("chat template: the same")
    else:
        console.print("chat template: differs", style="bold")
        _show_lines(template["lines"], console)
    for title, key in (
        ("recipe and dataset", "recipe"),
        ("packages", "packages"),
        ("files read from outside (SHA-256)", "outside"),
        ("code of stages", "code"),
    ):
        _show_keys(title, result[key], console)


def _show_metrics(metrics: dict[str, Any], console: Console) -> None:
    if metrics["scores"]:
        table = table_of(("test split", "a base>", "a tuned>", "b base>", "b tuned>", "b - a>"))
        for name, sides in metrics["scores"].items():
            a, b = sides["a"]["tuned"], sides["b"]["tuned"]
            known = isinstance(a, (int, float)) and isinstance(b, (int, float))
            table.add_row(
                name,
                *(_number(sides[side][who]) for side in ("a", "b") for who in ("base", "tuned")),
                f"{b - a:+.4f}" if known else "–",
            )
        console.print(table)
    else:
        console.print("scores: the evaluations are not in this store", style="yellow")
    rows = metrics["test_rows"]
    if rows and not rows["a"] == rows["b"] == rows["shared"]:
        console.print(
            f"judged on different test rows: {rows['a']:,} and {rows['b']:,}, {rows['shared']:,} of them the "
            "same; the scores are no comparison on equal terms",
            style="yellow",
            soft_wrap=True,
        )


def _show_rows(result: dict[str, Any], console: Console) -> None:
    rows = result["rows"]
    if rows is None:
        console.print(f"rows: {result['rows_unknown']}", style="yellow", soft_wrap=True)
        return
    console.print(
        f"training rows: {rows['same']:,} the same, {len(rows['added']):,} added, "
        f"{len(rows['removed']):,} removed, {len(rows['changed']):,} changed"
    )
    if not (rows["added"] or rows["removed"] or rows["changed"]):
        return
    table = table_of(("!", "row_id!", "group", "source line", "elsewhere"))
    for row in rows["changed"][:SHOWN]:
        old, new = row["before"], row["after"]
        place = _place(new) if _place(old) == _place(new) else f"{_place(old)} → {_place(new)}"
        table.add_row("~", f"{old['row_id'][:SHORT]} → {new['row_id'][:SHORT]}", new["group"], place, "")
    for mark, kind, key in (("+", "added", "before"), ("-", "removed", "now")):
        for row in rows[kind][:SHOWN]:
            where = f"{key} {row[key]}" if row[key] else ""
            table.add_row(mark, row["row_id"][:SHORT], row["group"], _place(row), where)
    console.print(table)
    more = sum(max(0, len(rows[kind]) - SHOWN) for kind in ("added", "removed", "changed"))
    if more:
        console.print(f"and {plural(more, 'row')} more; --json has all of them, with whole ids", style="dim")


def _show_lines(lines: list[str], console: Console) -> None:
    for line in lines:
        style = {"+": "green", "-": "red"}.get(line[:1], "dim")
        console.print(Text(f"  {printable(line)}", style), soft_wrap=True)


def _show_keys(title: str, differences: list[dict[str, Any]], console: Console) -> None:
    if not differences:
        console.print(f"{title}: the same")
        return
    table = table_of((title, "a", "b"))
    for item in differences:
        table.add_row(item["key"], _text(item["a"]), _text(item["b"]))
    console.print(table)


def _place(row: dict[str, Any]) -> str:
    return f"{row['file']}:{row['line']}"


def _text(value: Any) -> str:
    text = "–" if value is None else str(value)
    if len(text) == 64 and all(c in "0123456789abcdef" for c in text):
        return text[:SHORT]
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
