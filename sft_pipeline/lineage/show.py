"""Lineage on a terminal."""

from rich.console import Console
from rich.table import Table

from sft_pipeline.lineage.trace import Trace
from sft_pipeline.lineage.verify import Verification
from sft_pipeline.lineage.walk import Chain


def print_chain(chain: Chain, console: Console) -> None:
    """The chain as a table, newest first, and the source files with their hashes."""
    table = Table(title=f"{chain.nodes[0].asset}, snapshot {chain.nodes[0].partition}", title_justify="left")
    for name in ("asset", "made", "data version", "fingerprint", "code", "files", "rows", "where"):
        table.add_column(name, overflow="fold")
    for node in chain.nodes:
        m = node.manifest
        if node.path:
            where = "here" if node.path == chain.root else "in the store"
        else:
            where = "manifest only" if m else "not found"
        table.add_row(
            node.asset,
            m.created_at[:19].replace("T", " ") if m else "?",
            node.data_version[:12],
            node.fingerprint[:12],
            m.code_version[:12] if m else "?",
            str(len(m.files)) if m else "?",
            _rows(m.counts) if m else "?",
            where,
        )
    console.print(table)
    sources = chain.sources()
    console.print(
        f"source files: {len(sources)}"
        if sources
        else "source files: not recorded in a manifest that could be found"
    )
    for name, digest in sources.items():
        console.print(f"  {digest[:64]}  {_one_line(name)}", highlight=False, soft_wrap=True)


def _one_line(text: object) -> str:
    """A name of a file may hold line breaks, and would be read as a line of its own."""
    return str(text).replace("\n", "\\n")


def _rows(counts: dict[str, int]) -> str:
    return ", ".join(f"{k} {v}" for k, v in list(counts.items())[:3])


def print_verification(found: Verification, console: Console) -> None:
    """Verified or not, every finding, and what could not be reached."""
    for finding in found.findings:
        console.print(f"wrong        {_one_line(finding)}", style="red", highlight=False, soft_wrap=True)
    for line in found.unreachable:
        console.print(f"unreachable  {_one_line(line)}", style="yellow", highlight=False, soft_wrap=True)
    result, style = ("verified", "green") if found.verified else ("not verified", "red")
    rest = f"; {len(found.unreachable)} recorded things could not be reached" if found.unreachable else ""
    console.print(f"{result}: {found.files} files, {found.bytes / 1e6:.1f} MB hashed{rest}", style=style)


def print_trace(found: Trace, console: Console) -> None:
    """Where a group or row is: source lines, artifacts, updates, models."""
    if not found.found:
        console.print(f"{found.key} is in no artifact of the store")
        return
    sources = Table(title="source lines", title_justify="left")
    for name in ("file", "line", "row_id"):
        sources.add_column(name, overflow="fold")
    for s in found.sources:
        sources.add_row(s["file"], str(s["line"]), s["row_id"])
    console.print(sources)
    places = Table(title="artifacts", title_justify="left")
    for name in ("asset", "snapshot", "split", "rows", "note"):
        places.add_column(name, overflow="fold")
    for a in found.artifacts:
        places.add_row(a["asset"], a["partition"], a["side"] or "", str(a["rows"]), a["note"] or "")
    console.print(places)
    for b in found.blocks:
        updates = ", ".join(str(u) for u in b["updates"][:20]) + (" …" if len(b["updates"]) > 20 else "")
        console.print(
            f"{b['asset']} {b['partition']}: {b['side']} block {b['block']}, updates {updates or 'none'}",
            highlight=False,
        )
    for m in found.models:
        console.print(
            f"{m['asset']} {m['partition']} was trained on it: {m['path']}",
            style="bold",
            highlight=False,
            soft_wrap=True,
        )
    if not found.models:
        console.print("no exported model of this store was trained on it")
