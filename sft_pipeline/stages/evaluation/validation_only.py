"""The judgement of one training's last checkpoint on the validation side: what a sweep compares. The test side is not read."""

from sft_pipeline.stages.evaluation.build import check_side, checkpoints_of, rounded, side_of
from sft_pipeline.stages.evaluation.config import EvaluationStageConfig
from sft_pipeline.stages.evaluation.graders import make_graders
from sft_pipeline.stages.evaluation.judge import judge
from sft_pipeline.stages.evaluation.models import Models
from sft_pipeline.stages.evaluation.samples import SamplesWriter
from sft_pipeline.stages.stage import Build, Built
from sft_pipeline.store.files import write_json
from sft_pipeline.tables.parquet import count_rows
from sft_pipeline.text.reply import speech_of


def build(b: Build) -> Built:
    """Writes judgement.json (NaN, where nothing could be measured, as null) and samples.parquet."""
    stage_config: EvaluationStageConfig = b.config
    config = stage_config.evaluation
    tokenized = b.inputs["tokenized_rows"]
    checkpoints = checkpoints_of(b.inputs["trial_training"])
    step = max(checkpoints)
    graders = make_graders(config.graders)
    side = side_of(tokenized, "validation", config, bool(graders))
    ungradable = check_side(side, graders, b.report)
    samples = SamplesWriter(b.out / "samples.parquet", [g.name for g in graders])
    try:
        found = judge(
            Models(stage_config.model, checkpoints, b.report).tuned(step),
            side,
            config,
            graders,
            speech_of(tokenized),
            b.report,
            name="judging on the validation side",
            keep=samples.keeper(side.name, step),
        )
    finally:
        samples.close()
    scores = {
        name: None if value != value else value
        for name, value in ({"val_loss": found.loss} | found.means()).items()
    }
    rows = count_rows(side.parts)
    write_json(
        b.out / "judgement.json",
        rounded(
            {
                "format": 1,
                "step": step,
                "scores": scores,
                "rows": rows,
                "generated": len(side.positions),
                "unfinished": found.unfinished,
                "ungradable": ungradable,
            }
        ),
    )
    return Built(
        counts={
            "validation_rows": rows,
            "validation_generated": len(side.positions),
            "unfinished": found.unfinished,
            "step": step,
        }
    )
