"""The MLflow server: how it is reached, and what happens where it cannot be.

MLflow is an index of what the manifests hold. Whatever fails in it costs its entry, never an artifact: it is
said once in a run, and a server that makes the run wait is left alone for a while.
"""

import contextlib
import json
import logging
import os
import re
import time
from collections.abc import Callable
from typing import Any

from sft_pipeline.errors import InputError
from sft_pipeline.project import sft_home
from sft_pipeline.reporting import Reporter
from sft_pipeline.secret_text import public_address, redacted
from sft_pipeline.store.files import locked_if_possible

# MLflow's own patience is 7 retries of 2 minutes each, and longer where a server asks for it. Its links to a
# run, printed on stdout, hold the user and password of the server's address.
SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
# What these say would be a second warning, some of it with the server's address and all that is in it.
QUIET = {"alembic": "WARNING", "mlflow": "CRITICAL", "urllib3.connectionpool": "ERROR"}
SLOW_SECONDS = 1.0  # a call that fails after more is not repeated at once
PAUSES = 30  # times the seconds that it took
LONGEST_REASON = 300  # characters

# (what an error says, the problem, the remedy); the first that fits
PROBLEMS = (
    (r"\blocked\b", "has a locked database", "End the process that holds it"),
    (r"\b429\b|too many requests", "asks to be called less often", "Run the same command again later"),
    ("no space|disk is full|disk full|quota", "has no room left", "Make room on its disk"),
    (
        "deleted",
        "has had something deleted",
        "Restore it (mlflow experiments restore, mlflow runs restore), or delete it for good (mlflow gc)",
    ),
    (
        r"timed out|timeout|refused|resol|unreachable|no route|name or service|\breset\b|aborted",
        "does not answer",
        "Start the server, or correct MLFLOW_TRACKING_URI",
    ),
    (
        r"\b401\b|\b403\b|unauth|permission_denied|forbidden",
        "refuses the credentials",
        "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
    ),
    ("", "fails", "Look into its log, and check MLFLOW_TRACKING_URI"),
)


def address() -> str:
    """The server or database of this process, with all secrets in it."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{sft_home() / 'mlflow.db'}"


def connect() -> Any:
    """A client of the server.

    Raises:
        InputError: The server or database does not answer.
    """
    MlflowClient = _import_client()
    # Two processes that make the tables of one SQLite database at once trip over each other.
    makes_tables = address().startswith("sqlite:")
    alone = locked_if_possible(sft_home() / ".mlflow.lock") if makes_tables else contextlib.nullcontext()
    try:
        with alone:
            client = MlflowClient(tracking_uri=address())
            client.search_experiments(max_results=1)
        return client
    except Exception as error:
        raise InputError(described(error)) from None  # Dagster would keep the cause, with the address


def _import_client() -> Any:
    """The class of clients, with this package's patience and without its library's own warnings."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    from mlflow.tracking import MlflowClient

    for name, level in QUIET.items():
        logging.getLogger(name).setLevel(level)
    return MlflowClient


def described(error: Exception) -> str:
    """The problem, the server, what it said and the remedy, without a secret."""
    said = str(error).strip() or type(error).__name__
    problem, remedy = next((p, r) for pattern, p, r in PROBLEMS if re.search(pattern, said, re.IGNORECASE))
    innermost = re.sub(
        r"^\w+\([\"']?(.*?)[\"']?\)+$", r"\1", said.splitlines()[0].rpartition("Caused by ")[2]
    )
    reason = redacted(innermost)[:LONGEST_REASON].rstrip(".")
    return f"MLflow {problem} at {public_address(address())}: {reason}. {remedy}"


class GuardedClient:
    """A client of the server, none of whose failures reaches the caller.

    Args:
        report: Gets one warning, of the first thing that goes wrong.
        after: What the warning says of what becomes of the rest.
        outage: What an earlier step of the same run has given to `remember`.
        remember: Keeps a text for later steps of the run: that the warning was given, and until when the
            server is left alone.
    """

    def __init__(
        self,
        report: Reporter,
        after: str = "The artifacts are built all the same",
        outage: str | None = None,
        remember: Callable[[str], None] = lambda outage: None,
    ) -> None:
        self._report, self._after, self._remember = report, after, remember
        self._client: Any = None
        noted: list[Any] = json.loads(outage) if outage else [False, 0.0]
        self._warned: bool = noted[0]
        self._silent_until: float = noted[1]

    def attempt(self, call: Callable[[Any], Any]) -> bool:
        """Calls with a client. False where the server is left alone or something went wrong."""
        if time.time() < self._silent_until:
            return False
        began = time.monotonic()
        try:
            if self._client is None:
                _import_client()  # which takes seconds that are not the server's
                began = time.monotonic()
                self._client = connect()
            call(self._client)
            return True
        except Exception as error:
            self._failed(error, time.monotonic() - began)
            return False

    def _failed(self, error: Exception, seconds: float) -> None:
        slow, first = seconds > SLOW_SECONDS, not self._warned
        if slow:
            self._silent_until = time.time() + PAUSES * seconds
        if first:
            self._warned = True
            message = str(error) if self._client is None else described(error)
            self._report.log(f"{message}. {self._after}", "warning")
        if slow or first:
            try:
                self._remember(json.dumps([self._warned, self._silent_until]))
            except Exception:  # a later step warns again, then
                logging.getLogger(__name__).debug("the outage is not noted", exc_info=True)


class TrackedRun:
    """A run of the server's, opened by the first call that reaches it.

    Args:
        opening: Finds or makes the run: (experiment id, run id).

    Attributes:
        ids: Once it is open.
        incomplete: Something could not be recorded.
    """

    def __init__(self, client: GuardedClient, opening: Callable[[Any], tuple[str, str]]) -> None:
        self._client, self._opening = client, opening
        self.ids: tuple[str, str] | None = None
        self.incomplete = False

    @property
    def run_id(self) -> str | None:
        return self.ids[1] if self.ids else None

    def opened(self, client: Any) -> str:
        """The run's id; opens it."""
        if self.ids is None:
            self.ids = self._opening(client)
        return self.ids[1]

    def attempt(self, call: Callable[[Any, str], Any], *, retried_later: bool = False) -> bool:
        """Calls with a client and the run's id, as `GuardedClient.attempt`.

        Args:
            retried_later: The caller keeps what fails, and attempts it again: the run is not incomplete yet.
        """
        done = self._client.attempt(lambda client: call(client, self.opened(client)))
        self.incomplete |= not (done or retried_later)
        return done
