"""The three stages of a trial.

They are variants of the branch's own, made of the same code, but are no assets of the graph: a trial must
never be taken for the recipe's training.

    tokenized_rows, packed_shards ─▶ trial_probe ─▶ trial_training ─▶ trial_judgement
                                     accepted?                        validation split only

Before the recipe's own training the whole sanity check must pass. A trial needs only the part without which
its result would be worthless: labels, vocabulary and example boundaries are right. The overfitting trial and
the short run are left out: what they try, the trial itself tries longer, and whether a learning rate is too
high is what a sweep is to find out. The probe depends on data and model alone, so trials that differ in how
they train share one (`sanity.skip` skips it too, and is recorded). The best configuration is trained by
`sft run`, and meets the whole check there.
"""

from dataclasses import replace

from sft_pipeline.stages.evaluation.asset import STAGE as EVALUATION
from sft_pipeline.stages.evaluation.config import EvaluationConfig, EvaluationStageConfig
from sft_pipeline.stages.graph import STAGES
from sft_pipeline.stages.sanity_check.asset import STAGE as SANITY_CHECK
from sft_pipeline.stages.sanity_check.checks import PROBE_CHECKS
from sft_pipeline.stages.sanity_check.config import SanityCheckConfig, SanityConfig
from sft_pipeline.stages.stage import Branch, BuildFunction
from sft_pipeline.stages.trained_checkpoints.asset import STAGE as TRAINED_CHECKPOINTS

JUDGED_ROWS = 200


def _probe_config(branch: Branch) -> SanityCheckConfig:
    """Of the training only what the model is loaded by."""
    config = SANITY_CHECK.config(branch)
    assert isinstance(config, SanityCheckConfig)
    loaded_by = config.training.model_dump(include={"precision", "gradient_checkpointing", "seed"})
    return config.model_copy(
        update={
            "sanity": SanityConfig(skip=config.sanity.skip),
            "training": type(config.training)(**loaded_by),
        }
    )


def _judgement_config(branch: Branch) -> EvaluationStageConfig:
    """Without gates and ranking: they are applied to what was measured, and measure nothing."""
    recipe = branch.require_recipe()
    judged = recipe.evaluation.model_copy(
        update={
            "max_rows": min(JUDGED_ROWS, recipe.evaluation.max_rows or JUDGED_ROWS),
            "gates": [],
            "rank_by": EvaluationConfig().rank_by,
            "require_improvement": False,
        }
    )
    return EvaluationStageConfig(evaluation=judged, model=recipe.model)


def _load_probe() -> BuildFunction:
    from sft_pipeline.stages.sanity_check.build import build_probe

    return build_probe


def _load_judgement() -> BuildFunction:
    from sft_pipeline.stages.evaluation.build import build_trial_judgement

    return build_trial_judgement


PROBE = replace(
    SANITY_CHECK,
    name="trial_probe",
    package="sanity_check",
    description="Before a sweep's trials: labels, vocabulary, and the boundary probe on the real model.",
    config=_probe_config,
    load_build=_load_probe,
    checks=PROBE_CHECKS,
)

TRAINING = replace(
    TRAINED_CHECKPOINTS,
    name="trial_training",
    package="trained_checkpoints",
    description="One trial of a sweep: a short training with a complete schedule.",
    acceptance=("trial_probe",),
)

JUDGEMENT = replace(
    EVALUATION,
    name="trial_judgement",
    package="evaluation",
    description="One trial of a sweep: its last checkpoint judged on the validation split, never on test.",
    inputs=("tokenized_rows", "trial_training"),
    config=_judgement_config,
    load_build=_load_judgement,
    checks=(),
)

TRIAL_STAGES = {**STAGES, **{stage.name: stage for stage in (PROBE, TRAINING, JUDGEMENT)}}
