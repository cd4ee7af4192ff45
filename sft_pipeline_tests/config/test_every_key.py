"""No key that does nothing: each key of a recipe has a value that changes something one can see.

A table: the key, a changed value, where one looks, what is seen there without and with the change, and what
else both have set. What is seen is never the configuration itself nor a fingerprint, which differ for a key
that nothing reads too. A key without an entry fails, and so does an entry without its key.
"""

import pytest

from sft_pipeline.config.recipe import RecipeConfig
from sft_pipeline_tests.config import seen_in_artifacts as made
from sft_pipeline_tests.config import seen_in_libraries as arrives
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
    Key("name", "other", arrives.of_dagster(arrives.jobs), ["tiny_job"], ["other_job"]),
    Key("description", "For doors.", arrives.of_dagster(arrives.job_description), "", "For doors."),
    Key("description", "For doors.", arrives.registered_description, "", "For doors."),
    Key(
        "owner",
        "team:doors",
        arrives.of_dagster(arrives.owners("tiny/packed_shards")),
        ["team:sft"],
        ["team:doors"],
    ),
    Key("extends", "parent", arrives.inherited("seed"), 42, 7),
    Key(
        "dataset",
        "other",
        arrives.of_dagster(arrives.read_by("tiny/tokenized_rows")),
        ["small/grouped_split"],
        ["other/grouped_split"],
    ),
    # model
    Key("model.base", "wide", arrives.of_model(arrives.width), 32, 48),
    Key(
        "model.revision",
        "b" * 40,
        arrives.revision_asked_of_the_hub,
        {"a" * 40},
        {"b" * 40},
        {"model.base": "owner/name", "model.revision": "a" * 40},
    ),
    Key("model.tokenizer", "letters", made.vocabulary_of_the_rows, DIFFERENT, 333),
    Key("model.tokenizer", "letters", arrives.vocabulary_of_the_trainers_tokenizer, DIFFERENT, 333),
    Key(
        "model.parameterization",
        "full",
        arrives.of_model(arrives.class_name),
        "PeftModelForCausalLM",
        "LlamaForCausalLM",
    ),
    Key("model.lora.r", 2, arrives.of_adapter(arrives.rank), 4, 2),
    Key("model.lora.alpha", 16, arrives.of_adapter(arrives.scale), 8, 4),
    Key("model.lora.dropout", 0.5, arrives.of_adapter(arrives.dropout), 0.05, 0.5),
    Key("model.lora.target_modules", ["q_proj"], arrives.of_model(arrives.adapted), DIFFERENT, {"q_proj"}),
    Key("model.lora.use_rslora", True, arrives.of_adapter(arrives.scale), 8, 16),
    Key("model.lora.use_dora", True, arrives.of_adapter(arrives.has_magnitudes), False, True),
    Key("model.attention", "eager", arrives.of_model(arrives.attention), "sdpa", "eager"),
    Key("model.freeze", ["embed"], arrives.of_model(arrives.embeddings_trained), True, False, FULL),
    Key(
        "model.trust_remote_code",
        True,
        arrives.trust_in_remote_code,
        {"AutoConfig": False, "AutoModelForCausalLM": False, "AutoTokenizer": False},
        {"AutoConfig": True, "AutoModelForCausalLM": True, "AutoTokenizer": True},
    ),
    # template and tokens
    Key("template.chat_template", "alpaca", made.of_text("### Instruction:"), False, True),
    Key(
        "template.variables",
        {"tone": "loud"},
        made.of_text("loud user"),
        False,
        True,
        {"template.chat_template": "toned.jinja"},
    ),
    Key("template.ignore", ["reasoning_content"], made.count("tokenized_rows", "rows_rejected"), 2, 1),
    Key("template.system", "Be brief.", made.of_text("Be brief."), False, True),
    Key("tokens.max_length", 20, made.count("tokenized_rows", "rows_accepted"), 58, 0),
    Key("tokens.supervise", "all", made.of_text("May I", supervised=True), False, True),
    Key(
        "tokens.overflow",
        "truncate_answer",
        made.count("tokenized_rows", "truncated"),
        0,
        DIFFERENT,
        {"tokens.max_length": 30},
    ),
    Key("tokens.control_tokens", "neutralise", made.count("tokenized_rows", "neutralised"), 0, 1),
    Key("packing.strategy", "none", made.examples_share_blocks, True, False),
    # sanity
    Key("sanity.skip", True, made.of_sanity(lambda s: "overfit" in s), True, False, SANE),
    Key("sanity.overfit_rows", 3, made.of_sanity(lambda s: s["overfit"]["rows"]), 4, 3, SANE),
    Key("sanity.overfit_steps", 3, made.of_sanity(lambda s: len(s["overfit"]["losses"]) - 1), 6, 3, SANE),
    Key("sanity.overfit_loss", 0.999, made.check("sanity_check", "overfits"), False, True, SANE),
    Key("sanity.short_run_steps", 3, made.of_sanity(lambda s: len(s["short_run"]["loss"])), 4, 3, SANE),
    Key("sanity.samples", 2, made.of_sanity(lambda s: len(s["samples"])), 1, 2, SANE),
    # training
    Key("training.epochs", 2, made.epochs_of_the_plan, 1, 2),
    Key("training.max_steps", 3, made.of_training(made.updates_made), 4, 3),
    Key("training.learning_rate", 0.02, made.rate(1), 0.01, 0.02),
    Key("training.min_learning_rate", 0.01, made.rate(4), pytest.approx(0.0014645, rel=1e-3), 0.01),
    Key("training.schedule", "constant", made.rate(4), pytest.approx(0.0014645, rel=1e-3), 0.01),
    Key("training.warmup", 0.5, made.rate(1), 0.01, pytest.approx(0.01 / 3)),
    Key("training.decay", 0.75, made.rate(4), 0.01, pytest.approx(0.01 / 3), WSD),
    Key("training.weight_decay", 0.3, arrives.argument("weight_decay"), 0.01, 0.3),
    Key(
        "training.adam_betas",
        [0.8, 0.9],
        arrives.argument("adam_beta1", "adam_beta2"),
        (0.9, 0.999),
        (0.8, 0.9),
    ),
    Key("training.adam_epsilon", 1e-6, arrives.argument("adam_epsilon"), 1e-8, 1e-6),
    Key("training.clip", 0.3, arrives.argument("max_grad_norm"), 1.0, 0.3),
    Key("training.per_device_batch", 1, made.blocks_of_a_micro_batch, 2, 1),
    Key("training.per_device_batch", 1, arrives.argument("per_device_train_batch_size"), 2, 1),
    Key("training.gradient_accumulation", 3, made.most_blocks_of_an_update, 2, 6, BY_PARTS),
    Key("training.processes", 2, made.most_blocks_of_an_update, 2, 4, BY_PARTS),
    Key("training.processes", 2, arrives.launched_processes, "1", "2"),
    Key("training.blocks_per_update", 3, made.most_blocks_of_an_update, 2, 3),
    Key(
        "training.precision",
        "bf16",
        arrives.of_model(arrives.frozen_dtype),
        "torch.float32",
        "torch.bfloat16",
    ),
    Key("training.precision", "bf16", arrives.argument("bf16"), False, True),
    Key("training.gradient_checkpointing", True, arrives.argument("activation_checkpointing"), False, True),
    Key("training.compile", True, arrives.argument("torch_compile"), False, True),
    Key("training.neftune_alpha", 5.0, arrives.noise_on_embeddings, None, 5.0),
    Key("training.eval_steps", 1, made.of_training(made.evaluated_after), [0, 2, 4], [0, 1, 2, 3, 4]),
    Key(
        "training.save_steps",
        3,
        made.of_training(made.checkpoints),
        ["checkpoint-2", "checkpoint-4"],
        ["checkpoint-3", "checkpoint-4"],
    ),
    Key(
        "training.keep_checkpoints",
        1,
        made.of_training(made.checkpoints),
        ["checkpoint-2", "checkpoint-4"],
        ["checkpoint-4"],
    ),
    Key(
        "training.early_stopping",
        IMPATIENT["training.early_stopping"],
        made.of_training(made.updates_made),
        4,
        2,
    ),
    Key("training.early_stopping.patience", 3, made.of_training(made.updates_made), 2, 4, IMPATIENT),
    Key("training.early_stopping.min_delta", 0.0, made.of_training(made.updates_made), 2, 4, IMPATIENT),
    Key("training.report_to", ["tensorboard"], made.of_training(made.event_files), 0, 1),
    Key("training.seed", 7, arrives.argument("seed", "data_seed"), (42, 42), (7, 7)),
    Key("training.seed", 7, made.order_of_blocks, DIFFERENT, DIFFERENT),
    # graders
    *(
        Key(f"evaluation.graders[{kind}].name", "renamed", made.compared("renamed"), False, True)
        for kind in GRADERS
    ),
    *(
        Key(
            f"evaluation.graders[{kind}].kind",
            {"name": kind, "kind": "regex", "pattern": "^x$"},
            made.score(kind, OBJECT, OBJECT),
            1,
            0,
        )
        for kind in GRADERS
        if kind != "regex"
    ),
    Key(
        "evaluation.graders[regex].kind",
        {"name": "regex", "kind": "exact_match"},
        made.score("regex", "a decision", "x"),
        1,
        0,
    ),
    Key(
        "evaluation.graders[json_schema].schema",
        {"required": ["windows"]},
        made.score("json_schema", OBJECT),
        1,
        0,
    ),
    Key("evaluation.graders[json_schema].fenced", True, made.score("json_schema", FENCED), 0, 1),
    Key(
        "evaluation.graders[json_fields].fields",
        ["decision", "doors"],
        made.score("json_fields", '{"decision": "approve"}', OBJECT),
        1,
        0,
    ),
    Key("evaluation.graders[json_fields].fenced", True, made.score("json_fields", FENCED, OBJECT), 0, 1),
    Key("evaluation.graders[exact_match].ignore_case", True, made.score("exact_match", "Yes", "yes"), 0, 1),
    Key("evaluation.graders[regex].pattern", "window", made.score("regex", "a decision"), 1, 0),
    Key("evaluation.graders[regex].group", 1, made.score("regex", "a decision", "no such word"), 1, 0),
    Key(
        "evaluation.graders[numeric_answer].after", "####", made.score("numeric_answer", "5", "#### 5"), 1, 0
    ),
    Key("evaluation.graders[numeric_answer].tolerance", 1, made.score("numeric_answer", "5", "5.5"), 0, 1),
    Key(
        "evaluation.graders[python].callable",
        "graders_of_this_test:half",
        made.score("python", "anything"),
        1,
        0.5,
    ),
    # evaluation
    Key("evaluation.gates", ["exact_match >= 0.5"], made.check("evaluation", "gates_passed"), True, False),
    Key("evaluation.rank_by", ["exact_match"], made.of_evaluation(lambda e: e["chosen_step"]), 4, 2),
    Key(
        "evaluation.require_improvement",
        True,
        made.check("evaluation", "improvement"),
        True,
        False,
        {"evaluation.rank_by": ["exact_match"]},
    ),
    Key("evaluation.max_rows", 3, made.count("evaluation", "test_generated"), DIFFERENT, 3),
    Key("evaluation.max_new_tokens", 2, arrives.most_tokens_of_a_reply, 4, 2),
    Key("evaluation.batch_size", 3, arrives.most_prompts_at_once, DIFFERENT, 3),
    Key("evaluation.decoding.temperature", 1.5, made.replies, DIFFERENT, DIFFERENT),
    Key("evaluation.decoding.top_p", 0.1, made.replies, DIFFERENT, DIFFERENT, SAMPLED),
    Key("evaluation.decoding.seed", 1, made.replies, DIFFERENT, DIFFERENT, SAMPLED),
    # export and retrain
    Key("export.merge", False, made.of_export(made.has_merged_weights), True, False),
    Key("export.dtype", "bfloat16", made.of_export(made.merged_dtype), "float32", "bfloat16"),
    Key("export.license", "mit", made.of_export(made.licence_of_the_card), None, "mit"),
    Key("retrain.on_new_snapshot", True, arrives.of_dagster(arrives.sensor_jobs), [], ["tiny_job"]),
    Key("retrain.cron", "0 3 * * 1", arrives.of_dagster(arrives.schedules), [], ["0 3 * * 1"]),
]


def test_every_key_of_a_recipe_has_an_entry() -> None:
    check_complete(RecipeConfig, RECIPE)


@pytest.mark.parametrize("key", RECIPE, ids=ids_of(RECIPE))
def test_each_key_of_a_recipe_changes_what_it_says(shop: Workshop, key: Key) -> None:
    document = with_keys(RECIPE_DOCUMENT, key.given)
    after = changed(document, key.key, key.value)
    check_changes(shop, key, Side(DATASET_DOCUMENT, document), Side(DATASET_DOCUMENT, after))
