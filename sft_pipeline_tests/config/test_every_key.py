"""No key that does nothing: each key of a recipe has a value that changes something one can see.

A table: the key, a changed value, where one looks, what is seen there without and with the change, and what
else both have set. What is seen is never the configuration itself nor a fingerprint, which differ for a key
that nothing reads too. A key without an entry fails, and so does an entry without its key.
"""

import pytest

from sft_pipeline.config.recipe import RecipeConfig
from sft_pipeline_tests.config import observations as see
from sft_pipeline_tests.config.every_key import (
    DIFFERENT,
    Key,
    Side,
    Workshop,
    changed,
    check_changes,
    check_complete,
    ids_of,
    with_keys,
)
from sft_pipeline_tests.config.small_branch import DATASET_DOCUMENT, GRADERS, RECIPE_DOCUMENT

FULL = {"model.parameterization": "full"}
SANE = {
    "sanity.skip": False,
    "sanity.overfit_rows": 4,
    "sanity.overfit_steps": 6,
    "sanity.overfit_loss": 0.01,  # is not reached in so few steps: all of them are made
    "sanity.short_run_steps": 4,
    "sanity.samples": 1,
}
WSD = {"training.schedule": "wsd"}
IMPATIENT = {"training.early_stopping": {"patience": 1, "min_delta": 100}}
BY_PARTS = {"training.blocks_per_update": None, "packing.strategy": "none"}
SAMPLED = {"evaluation.decoding": {"temperature": 1.5}}
OBJECT, FENCED = '{"decision": "approve", "doors": 3}', '```json\n{"decision": "approve"}\n```'

RECIPE = [
    Key("name", "other", see.of_dagster(see.jobs), ["tiny_job"], ["other_job"]),
    Key("description", "For doors.", see.of_dagster(see.job_description), "", "For doors."),
    Key("description", "For doors.", see.registered_description, "", "For doors."),
    Key(
        "owner", "team:doors", see.of_dagster(see.owners("tiny/packed_shards")), ["team:sft"], ["team:doors"]
    ),
    Key("extends", "parent", see.inherited("seed"), 42, 7),
    Key(
        "dataset",
        "other",
        see.of_dagster(see.read_by("tiny/tokenized_rows")),
        ["small/grouped_split"],
        ["other/grouped_split"],
    ),
    # model
    Key("model.base", "wide", see.of_model(see.width), 32, 48),
    Key(
        "model.revision",
        "b" * 40,
        see.revision_asked_of_the_hub,
        {"a" * 40},
        {"b" * 40},
        {"model.base": "owner/name", "model.revision": "a" * 40},
    ),
    Key("model.tokenizer", "letters", see.vocabulary_of_the_rows, DIFFERENT, 333),
    Key(
        "model.parameterization",
        "full",
        see.of_model(see.class_name),
        "PeftModelForCausalLM",
        "LlamaForCausalLM",
    ),
    Key("model.lora.r", 2, see.of_adapter(see.rank), 4, 2),
    Key("model.lora.alpha", 16, see.of_adapter(see.scale), 8, 4),
    Key("model.lora.dropout", 0.5, see.of_adapter(see.dropout), 0.05, 0.5),
    Key("model.lora.target_modules", ["q_proj"], see.of_model(see.adapted), DIFFERENT, {"q_proj"}),
    Key("model.lora.use_rslora", True, see.of_adapter(see.scale), 8, 16),
    Key("model.lora.use_dora", True, see.of_adapter(see.has_magnitudes), False, True),
    Key("model.attention", "eager", see.of_model(see.attention), "sdpa", "eager"),
    Key("model.freeze", ["embed"], see.of_model(see.embeddings_trained), True, False, FULL),
    Key(
        "model.trust_remote_code",
        True,
        see.trust_in_remote_code,
        {"AutoConfig": False, "AutoModelForCausalLM": False, "AutoTokenizer": False},
        {"AutoConfig": True, "AutoModelForCausalLM": True, "AutoTokenizer": True},
    ),
    # template and tokens
    Key("template.chat_template", "alpaca", see.of_text("### Instruction:"), False, True),
    Key(
        "template.variables",
        {"tone": "loud"},
        see.of_text("loud user"),
        False,
        True,
        {"template.chat_template": "toned.jinja"},
    ),
    Key("template.ignore", ["reasoning_content"], see.count("tokenized_rows", "rows_rejected"), 2, 1),
    Key("template.system", "Be brief.", see.of_text("Be brief."), False, True),
    Key("tokens.max_length", 20, see.count("tokenized_rows", "rows_accepted"), 58, 0),
    Key("tokens.supervise", "all", see.of_text("May I", supervised=True), False, True),
    Key(
        "tokens.overflow",
        "truncate_answer",
        see.count("tokenized_rows", "truncated"),
        0,
        DIFFERENT,
        {"tokens.max_length": 30},
    ),
    Key("tokens.control_tokens", "neutralise", see.count("tokenized_rows", "neutralised"), 0, 1),
    Key("packing.strategy", "none", see.examples_share_blocks, True, False),
    # sanity
    Key("sanity.skip", True, see.of_sanity(lambda s: "overfit" in s), True, False, SANE),
    Key("sanity.overfit_rows", 3, see.of_sanity(lambda s: s["overfit"]["rows"]), 4, 3, SANE),
    Key("sanity.overfit_steps", 3, see.of_sanity(lambda s: len(s["overfit"]["losses"]) - 1), 6, 3, SANE),
    Key("sanity.overfit_loss", 0.999, see.check("sanity_check", "overfits"), False, True, SANE),
    Key("sanity.short_run_steps", 3, see.of_sanity(lambda s: len(s["short_run"]["loss"])), 4, 3, SANE),
    Key("sanity.samples", 2, see.of_sanity(lambda s: len(s["samples"])), 1, 2, SANE),
    # training
    Key("training.epochs", 2, see.epochs_of_the_plan, 1, 2),
    Key("training.max_steps", 3, see.of_training(see.updates_made), 4, 3),
    Key("training.learning_rate", 0.02, see.rate(1), 0.01, 0.02),
    Key("training.min_learning_rate", 0.01, see.rate(4), pytest.approx(0.0014645, rel=1e-3), 0.01),
    Key("training.schedule", "constant", see.rate(4), pytest.approx(0.0014645, rel=1e-3), 0.01),
    Key("training.warmup", 0.5, see.rate(1), 0.01, pytest.approx(0.01 / 3)),
    Key("training.decay", 0.75, see.rate(4), 0.01, pytest.approx(0.01 / 3), WSD),
    Key("training.weight_decay", 0.3, see.argument("weight_decay"), 0.01, 0.3),
    Key(
        "training.adam_betas", [0.8, 0.9], see.argument("adam_beta1", "adam_beta2"), (0.9, 0.999), (0.8, 0.9)
    ),
    Key("training.adam_epsilon", 1e-6, see.argument("adam_epsilon"), 1e-8, 1e-6),
    Key("training.clip", 0.3, see.argument("max_grad_norm"), 1.0, 0.3),
    Key("training.per_device_batch", 1, see.blocks_of_a_micro_batch, 2, 1),
    Key("training.per_device_batch", 1, see.argument("per_device_train_batch_size"), 2, 1),
    Key("training.gradient_accumulation", 3, see.most_blocks_of_an_update, 2, 6, BY_PARTS),
    Key("training.processes", 2, see.most_blocks_of_an_update, 2, 4, BY_PARTS),
    Key("training.processes", 2, see.launched_processes, "1", "2"),
    Key("training.blocks_per_update", 3, see.most_blocks_of_an_update, 2, 3),
    Key("training.precision", "bf16", see.of_model(see.frozen_dtype), "torch.float32", "torch.bfloat16"),
    Key("training.gradient_checkpointing", True, see.argument("activation_checkpointing"), False, True),
    Key("training.compile", True, see.argument("torch_compile"), False, True),
    Key("training.neftune_alpha", 5.0, see.argument("neftune_noise_alpha"), None, 5.0),
    Key("training.eval_steps", 1, see.of_training(see.evaluated_after), [0, 2, 4], [0, 1, 2, 3, 4]),
    Key(
        "training.save_steps",
        3,
        see.of_training(see.checkpoints),
        ["checkpoint-2", "checkpoint-4"],
        ["checkpoint-3", "checkpoint-4"],
    ),
    Key(
        "training.keep_checkpoints",
        1,
        see.of_training(see.checkpoints),
        ["checkpoint-2", "checkpoint-4"],
        ["checkpoint-4"],
    ),
    Key(
        "training.early_stopping",
        IMPATIENT["training.early_stopping"],
        see.of_training(see.updates_made),
        4,
        2,
    ),
    Key("training.early_stopping.patience", 3, see.of_training(see.updates_made), 2, 4, IMPATIENT),
    Key("training.early_stopping.min_delta", 0.0, see.of_training(see.updates_made), 2, 4, IMPATIENT),
    Key("training.report_to", ["tensorboard"], see.of_training(see.event_files), 0, 1),
    Key("training.seed", 7, see.argument("seed", "data_seed"), (42, 42), (7, 7)),
    Key("training.seed", 7, see.order_of_blocks, DIFFERENT, DIFFERENT),
    # graders
    *(
        Key(f"evaluation.graders[{kind}].name", "renamed", see.compared("renamed"), False, True)
        for kind in GRADERS
    ),
    *(
        Key(
            f"evaluation.graders[{kind}].kind",
            {"name": kind, "kind": "regex", "pattern": "^x$"},
            see.score(kind, OBJECT, OBJECT),
            1,
            0,
        )
        for kind in GRADERS
        if kind != "regex"
    ),
    Key(
        "evaluation.graders[regex].kind",
        {"name": "regex", "kind": "exact_match"},
        see.score("regex", "a decision", "x"),
        1,
        0,
    ),
    Key(
        "evaluation.graders[json_schema].schema",
        {"required": ["windows"]},
        see.score("json_schema", OBJECT),
        1,
        0,
    ),
    Key("evaluation.graders[json_schema].fenced", True, see.score("json_schema", FENCED), 0, 1),
    Key(
        "evaluation.graders[json_fields].fields",
        ["decision", "doors"],
        see.score("json_fields", '{"decision": "approve"}', OBJECT),
        1,
        0,
    ),
    Key("evaluation.graders[json_fields].fenced", True, see.score("json_fields", FENCED, OBJECT), 0, 1),
    Key("evaluation.graders[exact_match].ignore_case", True, see.score("exact_match", "Yes", "yes"), 0, 1),
    Key("evaluation.graders[regex].pattern", "window", see.score("regex", "a decision"), 1, 0),
    Key("evaluation.graders[regex].group", 1, see.score("regex", "a decision", "no such word"), 1, 0),
    Key("evaluation.graders[numeric_answer].after", "####", see.score("numeric_answer", "5", "#### 5"), 1, 0),
    Key("evaluation.graders[numeric_answer].tolerance", 1, see.score("numeric_answer", "5", "5.5"), 0, 1),
    Key(
        "evaluation.graders[python].callable",
        "graders_of_this_test:half",
        see.score("python", "anything"),
        1,
        0.5,
    ),
    # evaluation
    Key("evaluation.gates", ["exact_match >= 0.5"], see.check("evaluation", "gates_passed"), True, False),
    Key("evaluation.rank_by", ["exact_match"], see.of_evaluation(lambda e: e["chosen_step"]), 4, 2),
    Key(
        "evaluation.require_improvement",
        True,
        see.check("evaluation", "improvement"),
        True,
        False,
        {"evaluation.rank_by": ["exact_match"]},
    ),
    Key("evaluation.max_rows", 3, see.count("evaluation", "test_generated"), DIFFERENT, 3),
    Key("evaluation.max_new_tokens", 2, see.most_tokens_of_a_reply, 4, 2),
    Key("evaluation.batch_size", 3, see.most_prompts_at_once, DIFFERENT, 3),
    Key("evaluation.decoding.temperature", 1.5, see.replies, DIFFERENT, DIFFERENT),
    Key("evaluation.decoding.top_p", 0.1, see.replies, DIFFERENT, DIFFERENT, SAMPLED),
    Key("evaluation.decoding.seed", 1, see.replies, DIFFERENT, DIFFERENT, SAMPLED),
    # export and retrain
    Key("export.merge", False, see.of_export(see.has_merged_weights), True, False),
    Key("export.dtype", "bfloat16", see.of_export(see.merged_dtype), "float32", "bfloat16"),
    Key("export.license", "mit", see.of_export(see.licence_of_the_card), None, "mit"),
    Key("retrain.on_new_snapshot", True, see.of_dagster(see.sensor_jobs), [], ["tiny_job"]),
    Key("retrain.cron", "0 3 * * 1", see.of_dagster(see.schedules), [], ["0 3 * * 1"]),
]


def test_every_key_of_a_recipe_has_an_entry() -> None:
    check_complete(RecipeConfig, RECIPE)


@pytest.mark.parametrize("key", RECIPE, ids=ids_of(RECIPE))
def test_each_key_of_a_recipe_changes_what_it_says(shop: Workshop, key: Key) -> None:
    document = with_keys(RECIPE_DOCUMENT, key.given)
    after = changed(document, key.key, key.value)
    check_changes(shop, key, Side(DATASET_DOCUMENT, document), Side(DATASET_DOCUMENT, after))
