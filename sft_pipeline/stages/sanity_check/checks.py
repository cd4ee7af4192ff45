"""What the sanity check reports, and what of it a sweep's trials need."""

from sft_pipeline.stages.stage import CheckSpec

CHECKS = (
    CheckSpec(
        "ids_in_vocabulary", True, "Every id is inside the model's vocabulary, and blocks fit its positions."
    ),
    CheckSpec(
        "labels_match",
        True,
        "Labels equal input ids wherever supervised; template and tokenizer are those of the rows.",
    ),
    CheckSpec(
        "exported_tokenizer",
        True,
        "AutoTokenizer gives training's ids, as a server loads the tokenizer beside the base's config.json.",
    ),
    CheckSpec(
        "graders_run", True, "Every grader fits the expected completions, and gives a score for any reply."
    ),
    CheckSpec(
        "boundaries",
        True,
        "No example of a block sees another: changing one moves no other's predictions, "
        "and packed loss equals unpacked loss.",
    ),
    CheckSpec("causal", True, "No prediction sees the tokens that follow it in its own example."),
    CheckSpec("overfits", True, "A throw-away copy of the model can overfit a few rows."),
    CheckSpec(
        "short_run_stable",
        True,
        "A short run at the recipe's own learning rate neither diverges nor oscillates nor meets a NaN.",
    ),
    CheckSpec("samples", False, "After the short run the model says something, and ends."),
    CheckSpec(
        "exportable",
        True,
        "A checkpoint of the short run, saved, exported and loaded again, is the model that was trained.",
    ),
)

# Without what depends on how the model is trained.
_TRIALS = ("overfits", "short_run_stable", "samples", "exportable")
PROBE_CHECKS = tuple(c for c in CHECKS if c.name not in _TRIALS)
