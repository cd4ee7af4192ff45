"""Draws in a process of its own, so that nobody waits while matplotlib is imported, and hardly while it draws.

    with Painter() as painter:
        ...                                        # rows
        painter.draw(histogram, path, lengths)     # goes on at once
        ...                                        # the end of the context waits for what is still being drawn

The process is kept for the next stage that is built in this one. With SFT_WORKERS=1 all is drawn here.
"""

from collections.abc import Callable
from types import TracebackType
from typing import Any

from sft_pipeline.stages import standby
from sft_pipeline.stages.workers import Answer, Worker, worker_count

Drawing = tuple[Callable[..., None], tuple[Any, ...], dict[str, Any]]


class Painter:
    """Draws pictures, in order. Entering it starts the process."""

    def __init__(self) -> None:
        self._worker: Worker | None = None
        self._drawings: list[Answer] = []

    def draw(self, function: Callable[..., None], *arguments: Any, **named: Any) -> None:
        """Calls a function of an importable module that draws a picture into a file.

        Args:
            arguments, named: Picklable.
        """
        if self._worker is None:
            function(*arguments, **named)
        else:
            self._drawings.append(self._worker.ask((function, arguments, named)))

    def __enter__(self) -> "Painter":
        self._worker = standby.take(_prepared) if worker_count() > 1 else None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """
        Raises:
            SftError: The process died.
            Exception: What a function raised.
        """
        good = False
        try:
            if kind is None:
                for drawing in self._drawings:
                    drawing.get()
                good = True
        finally:
            if self._worker:
                standby.keep(self._worker) if good else self._worker.end()


def _prepared() -> Callable[[Drawing], None]:
    from sft_pipeline.plots.canvas import blank

    blank(1, 1)  # imports what draws
    return _draw


def _draw(drawing: Drawing) -> None:
    function, arguments, named = drawing
    function(*arguments, **named)
