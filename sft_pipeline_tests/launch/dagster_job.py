"""A job whose only step hangs in an isolated child, under the multiprocess executor; run as a program, it is
a run worker.
"""

import multiprocessing
import os
import sys
from pathlib import Path

import dagster as dg

from sft_pipeline.launch.launcher import run_isolated
from sft_pipeline_tests.launch.test_launcher import STAGE, a_build

FOLDER = Path(os.environ.get("TEST_FOLDER", "."))


@dg.op(pool="gpu", retry_policy=dg.RetryPolicy(max_retries=1))
def train(context: dg.OpExecutionContext) -> int:
    (FOLDER / "step_worker").write_text(str(os.getpid()))
    parent = multiprocessing.parent_process()
    built = run_isolated(STAGE, a_build(FOLDER, "hang_once"), watch=[str(parent.pid)])
    (FOLDER / "left").write_text(str(built.counts["left"]))
    return built.counts["left"]


@dg.job(executor_def=dg.multiprocess_executor)
def isolated_job():
    train()


def main() -> None:
    with dg.DagsterInstance.get() as instance:
        with dg.execute_job(
            dg.reconstructable(isolated_job), instance=instance, tags={"test": "hang"}
        ) as result:
            sys.exit(0 if result.success else 1)


if __name__ == "__main__":
    from sft_pipeline_tests.launch import (
        dagster_job,  # reconstructable needs the importable module, not __main__
    )

    dagster_job.main()
