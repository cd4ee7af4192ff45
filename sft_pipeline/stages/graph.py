"""The stages in the order data meets them."""

from sft_pipeline.stages.evaluation.asset import STAGE as EVALUATION
from sft_pipeline.stages.exported_model.asset import STAGE as EXPORTED_MODEL
from sft_pipeline.stages.grouped_split.asset import STAGE as GROUPED_SPLIT
from sft_pipeline.stages.packed_shards.asset import STAGE as PACKED_SHARDS
from sft_pipeline.stages.raw_rows.asset import STAGE as RAW_ROWS
from sft_pipeline.stages.sanity_check.asset import STAGE as SANITY_CHECK
from sft_pipeline.stages.tokenized_rows.asset import STAGE as TOKENIZED_ROWS
from sft_pipeline.stages.trained_checkpoints.asset import STAGE as TRAINED_CHECKPOINTS
from sft_pipeline.stages.validated_rows.asset import STAGE as VALIDATED_ROWS

STAGES = {
    stage.name: stage
    for stage in (
        RAW_ROWS,
        VALIDATED_ROWS,
        GROUPED_SPLIT,
        TOKENIZED_ROWS,
        PACKED_SHARDS,
        SANITY_CHECK,
        TRAINED_CHECKPOINTS,
        EVALUATION,
        EXPORTED_MODEL,
    )
}

DATASET_STAGES = [s for s in STAGES.values() if s.of_dataset]
RECIPE_STAGES = [s for s in STAGES.values() if not s.of_dataset]
