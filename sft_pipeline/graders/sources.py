"""The files outside the store that graders read: JSON schemas, and the sources of Python graders."""

from collections.abc import Sequence

from sft_pipeline.errors import InputError
from sft_pipeline.external_files import digest_file
from sft_pipeline.graders.config import GraderConfig, JsonSchemaGrader, PythonGrader
from sft_pipeline.project import project_path
from sft_pipeline.user_code import digest_function


def digest_graders(graders: Sequence[GraderConfig]) -> dict[str, str]:
    """{file: SHA-256} of everything that graders read from outside.

    Raises:
        InputError: A file or module is not there; the message names the grader.
    """
    found: dict[str, str] = {}
    for grader in graders:
        if isinstance(grader, JsonSchemaGrader) and isinstance(grader.schema_, str):
            path = project_path(grader.schema_)
            if not path.is_file():
                raise InputError(
                    f"grader {grader.name}: {path} does not exist (relative paths start at the folder of "
                    "dagster.yaml)"
                )
            found[grader.schema_] = digest_file(path)
        elif isinstance(grader, PythonGrader):
            found |= digest_function(f"grader {grader.name}", grader.callable)
    return found
