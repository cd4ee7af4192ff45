"""Draws in a process of its own, so that nobody waits while matplotlib is imported, and hardly while it draws.

    with Painter() as painter:
        ...                                        # rows
        painter.draw(histogram, path, lengths)     # goes on at once
        ...                                        # the end of the context waits for what is still being drawn

The process is kept for the next stage that is built in this one. With SFT_WORKERS=1 all is drawn here.
"""

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from sft_pipeline.stages.workers import Worker, worker_count

Drawing = tuple[Callable[..., None], tuple[Any, ...], dict[str, Any]]

_lock = threading.Lock()
_idle: list[Worker] = []


class Painter:
    """Draws pictures, in order. Entering it starts the process."""

    def __init__(self) -> None:
        self._worker: Worker | None = None
        self._waiting = 0

    def draw(self, function: Callable[..., None], *arguments: Any, **named: Any) -> None:
        """Calls a function of an importable module that draws a picture into a file.

        Args:
            arguments, named: Picklable.
        """
        if self._worker is None:
            function(*arguments, **named)
        else:
            self._worker.send((function, arguments, named))
            self._waiting += 1

    def finish(self) -> None:
        """Waits until all is drawn.

        Raises:
            SftError: The process died.
            Exception: What a function raised.
        """
        while self._worker and self._waiting:
            self._worker.receive()
            self._waiting -= 1

    def __enter__(self) -> "Painter":
        if worker_count() > 1:
            with _lock:
                self._worker = _idle.pop() if _idle else None
            if self._worker and not self._worker.alive:
                self._worker.end()
                self._worker = None
            self._worker = self._worker or Worker(_prepared, ())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        worker = self._worker
        try:
            if kind is None:
                self.finish()
        except BaseException:
            kind = BaseException
            raise
        finally:
            self._worker = None
            if worker and kind is None:
                with _lock:
                    _idle.append(worker)
            elif worker:
                worker.end()


def _prepared() -> Callable[[Drawing], None]:
    from sft_pipeline.figures import blank

    blank(1, 1)  # imports what draws
    return _draw


def _draw(drawing: Drawing) -> None:
    function, arguments, named = drawing
    function(*arguments, **named)
