"""What evaluation reads of a recipe: graders, gates, ranking, decoding."""

import math
import re
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from sft_pipeline.bounded import compiled
from sft_pipeline.config.base import Config
from sft_pipeline.graders.config import GraderConfig, JsonSchemaGrader, RegexGrader
from sft_pipeline.json_schemas import check_schema
from sft_pipeline.training.config import ModelConfig

SAMPLE_COLUMNS = ("side", "model", "step", "row_id", "group", "prompt", "reply", "expected", "finished")
"""Of samples.parquet, which has one column more for each grader."""
CHECKPOINT_KEYS = ("val_loss", "gates", "rank", "chosen", "unfinished", "supervised_tokens")
"""Of a checkpoint in evaluation.json, beside its step and each grader's mean."""
_NAME = re.compile(r"[A-Za-z][\w.-]*")


class DecodingConfig(Config):
    """Greedy by default, so that an evaluation can be repeated."""

    temperature: Annotated[float, Field(ge=0, description="0: the most likely token each time")] = 0.0
    top_p: Annotated[
        float, Field(gt=0, le=1, description="sample from the likeliest tokens with this share")
    ] = 1.0
    seed: Annotated[int, Field(description="of sampling")] = 0


class EvaluationConfig(Config):
    """How checkpoints are judged on held-out behaviour, and how one is chosen."""

    graders: Annotated[list[GraderConfig], Field(description="what scores a reply")] = []
    gates: Annotated[list[str], Field(description='for example "format_pass_rate >= 0.98"')] = []
    rank_by: Annotated[
        list[str], Field(min_length=1, description="names in order of weight; a minus means lower is better")
    ] = ["-val_loss"]
    require_improvement: Annotated[
        bool,
        Field(description="the winner must beat the base on the first term of rank_by, on the test split"),
    ] = True
    max_rows: Annotated[
        int | None, Field(ge=1, description="rows per split that are generated; null: all")
    ] = None
    max_new_tokens: Annotated[int, Field(ge=1, description="tokens of a reply at most")] = 256
    batch_size: Annotated[int, Field(ge=1, description="prompts that are generated together")] = 32
    decoding: DecodingConfig = DecodingConfig()

    @field_validator("graders")
    @classmethod
    def _usable(cls, graders: list[GraderConfig]) -> list[GraderConfig]:
        """What a file has in it is checked where the recipe is loaded (`config/load.py`)."""
        for grader in graders:
            try:
                if isinstance(grader, RegexGrader):
                    compiled(grader.pattern)
                elif isinstance(grader, JsonSchemaGrader) and not isinstance(grader.schema_, str):
                    check_schema(grader.schema_)
            except ValueError as error:
                raise ValueError(f"grader {grader.name}: {error}") from error
        return graders

    @model_validator(mode="after")
    def _names_known(self) -> "EvaluationConfig":
        names = [g.name for g in self.graders]
        if len(set(names)) != len(names):
            raise ValueError(f"two graders share a name: {names}")
        if taken := [n for n in names if n in (*SAMPLE_COLUMNS, *CHECKPOINT_KEYS, "test_loss")]:
            raise ValueError(f"a grader cannot be named {taken[0]}, which evaluation itself uses: rename it")
        if odd := [n for n in names if not _NAME.fullmatch(n)]:
            raise ValueError(
                f"a grader cannot be named {odd[0]!r}: take letters, digits, _, . and -, a letter first, as "
                "names of metrics are made of"
            )
        for gate in self.gates:
            self._check_gate(gate)
        for term in self.rank_by:
            name = term.removeprefix("-")
            if name not in self._measures():
                raise ValueError(f"rank_by {term}: no grader is named {name}; known: {self._known()}")
            if term == "val_loss":
                raise ValueError("rank_by val_loss: the highest loss would win; write -val_loss")
        return self

    def _measures(self) -> set[str]:
        return {*(g.name for g in self.graders), "val_loss"}

    def _known(self) -> str:
        return ", ".join(sorted(self._measures()))

    def _check_gate(self, gate: str) -> None:
        words = gate.split()
        if len(words) != 3 or words[1] not in (">=", ">", "<=", "<", "==") or not _is_number(words[2]):
            raise ValueError(f'gate "{gate}": write it as "NAME >= NUMBER" (also >, <=, <, ==)')
        name, sign, bound = words[0], words[1], float(words[2])
        if name not in self._measures():
            raise ValueError(f'gate "{gate}": no grader is named {name}; known: {self._known()}')
        # Shares lie between 0 and 1, a loss is not negative; what a Python grader gives is its own.
        if any(g.name == name and g.kind == "python" for g in self.graders):
            return
        highest = math.inf if name == "val_loss" else 1.0
        met = {
            ">=": bound <= highest,
            ">": bound < highest,
            "<=": bound >= 0,
            "<": bound > 0,
            "==": 0 <= bound <= highest,
        }
        if not met[sign]:
            raise ValueError(f'gate "{gate}": no {name} can meet it, which lies between 0 and {highest:g}')


def _is_number(text: str) -> bool:
    """Whether a text is a finite number."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


class EvaluationStageConfig(Config):
    """Everything evaluation depends on."""

    evaluation: EvaluationConfig
    model: ModelConfig
