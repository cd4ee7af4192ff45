"""What every benchmark prints: the machine, Markdown tables for RESULTS.md, aims and whether they are met."""

import os
import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import psutil

PACKAGES = ("torch", "transformers", "trl", "datasets", "tokenizers", "pyarrow")


def machine() -> dict[str, str]:
    """What the figures were taken on."""
    names = [platform.processor() or platform.machine()]
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")] or names
    return {
        "cpu": f"{names[0]}, {os.cpu_count()} cores",
        "memory": f"{psutil.virtual_memory().total / (1 << 30):.0f} GiB",
        "python": platform.python_version(),
        "packages": ", ".join(f"{name} {version(name)}" for name in PACKAGES),
        "load before": f"{os.getloadavg()[0]:.1f}",
    }


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; every column but the first is aligned to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "| "
        + " | ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        + " |"
        for line in lines
    )


def median_and_spread(values: Sequence[float], form: str = ".2f") -> str:
    """ "0.83 (0.80 to 0.86)": the median, and where there are several values the least and the greatest."""
    spread = f" ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else ""
    return f"{statistics.median(values):{form}}{spread}"


def aim(what: str, values: Sequence[float], *, least: float | None = None, most: float | None = None) -> str:
    """One line: what is aimed at, what was found, and whether its median meets the bound.

    Args:
        least, most: The bound; one of the two.
    """
    median = statistics.median(values)
    met = (least is None or median >= least) and (most is None or median <= most)
    bound = f"at most {most:g}" if least is None else f"at least {least:g}"
    return f"- {what}: {median_and_spread(values)}, {bound}: {'met' if met else 'MISSED'}"


def mib(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"
