"""What the tags of a run may change of its recipe.

Whoever can start a run in the UI can write its tags. They may change numbers; what runs code, or reads files
outside the project, is changed in a recipe file or with `sft run --set` alone.
"""

from sft_pipeline.config.recipe import RecipeConfig
from sft_pipeline.errors import InputError
from sft_pipeline.project import project_path, project_root

PATHS = ("model.base", "model.tokenizer", "template.chat_template")


def refuse_code(written: RecipeConfig, tagged: RecipeConfig) -> None:
    """Compares a recipe with its file.

    Args:
        written: As the file has it.
        tagged: With the overrides of a run's tags.

    Raises:
        InputError: An override sets what runs code, or a path outside the project.
    """
    found = []
    if tagged.model.trust_remote_code and not written.model.trust_remote_code:
        found.append("model.trust_remote_code")
    graders = [g for g in tagged.evaluation.graders if g.kind == "python"]
    if any(g not in written.evaluation.graders for g in graders):
        found.append("a grader of the kind python in evaluation.graders")
    known = [g.schema_ for g in written.evaluation.graders if g.kind == "json_schema"]
    for schema in (g.schema_ for g in tagged.evaluation.graders if g.kind == "json_schema"):
        if isinstance(schema, str) and schema not in known and is_outside(schema):
            found.append(f"a grader's schema with a path outside the project ({schema})")
    for key in PATHS:
        section, name = key.split(".")
        before, after = (getattr(getattr(recipe, section), name) for recipe in (written, tagged))
        if after and after != before and is_outside(after):
            found.append(f"{key} with a path outside the project ({after})")
    if found:
        raise InputError(
            f"the tags of this run set {', '.join(found)}: tags cannot set what runs code or reads other "
            "folders. Write it into the recipe file, or use sft run --set"
        )


def is_outside(path: str) -> bool:
    """Whether a path, absolute or relative, leads out of the project. A hub id or a name does not."""
    return not project_path(path).is_relative_to(project_root().resolve())
