"""Builds evaluation: judges every checkpoint on the validation side, chooses, and compares with the base on the test side."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sft_pipeline.errors import InputError
from sft_pipeline.reporting import Reporter
from sft_pipeline.stages.evaluation.compare import Comparison, compare
from sft_pipeline.stages.evaluation.config import EvaluationConfig, EvaluationStageConfig
from sft_pipeline.stages.evaluation.graders import Grader, check_expected, make_graders
from sft_pipeline.stages.evaluation.judge import Judgement, Side, judge
from sft_pipeline.stages.evaluation.models import Models
from sft_pipeline.stages.evaluation.samples import SamplesWriter
from sft_pipeline.stages.evaluation.select import Candidate, Gate, Selection, select
from sft_pipeline.stages.evaluation.shown import (
    checkpoint_rows,
    comparison_markdown,
    plot_checkpoints,
    plot_comparison,
    some_samples,
)
from sft_pipeline.stages.evaluation.verdicts import (
    TEST_LOSS,
    gates_passed,
    graded_rows,
    improvement,
    replies_end,
    selection_explained,
)
from sft_pipeline.stages.stage import Build, Built, markdown, number, plot, table, text
from sft_pipeline.store import Artifact
from sft_pipeline.store.files import write_json
from sft_pipeline.tables.held_out import chosen_positions, held_out_rows
from sft_pipeline.tables.parquet import count_rows
from sft_pipeline.text.reply import Speech, speech_of


def build(b: Build) -> Built:
    stage_config: EvaluationStageConfig = b.config
    config = stage_config.evaluation
    tokenized = b.inputs["tokenized_rows"]
    checkpoints = checkpoints_of(b.inputs["trained_checkpoints"])
    graders = make_graders(config.graders)
    validation, test = (side_of(tokenized, name, config, bool(graders)) for name in ("validation", "test"))
    ungradable = {s.name: check_side(s, graders, b.report) for s in (validation, test)}
    speech = speech_of(tokenized)
    models = Models(stage_config.model, checkpoints, b.report)
    samples = SamplesWriter(b.out / "samples.parquet", [g.name for g in graders])
    try:
        judged = _judge_checkpoints(models, validation, config, graders, speech, samples, b.report)
        selection = _choose(judged, config)
        b.report.log(f"chosen: {selection.why}")
        tuned, base, shown = _judge_test(
            models, selection.step, test, config, graders, speech, samples, b.report
        )
    finally:
        samples.close()
    comparisons = compare_sides(base, tuned, test, graders, config)
    _report_test(comparisons, selection.step, shown, b.report)
    groups = {s.name: _groups(s.parts) for s in (validation, test)}
    write_json(
        b.out / "evaluation.json",
        rounded(
            _summary(
                config, judged, selection, base, tuned, comparisons, (validation, test), groups, ungradable
            )
        ),
    )
    return Built(
        counts={
            "checkpoints": len(judged),
            "validation_rows": count_rows(validation.parts),
            "validation_generated": len(validation.positions),
            "test_rows": count_rows(test.parts),
            "test_groups": len(set(groups["test"])),
            "test_generated": len(test.positions),
            "unfinished_base": base.unfinished,
            "unfinished_tuned": tuned.unfinished,
            "chosen_step": selection.step,
        },
        checks=(
            gates_passed(selection, config, count_rows(validation.parts)),
            improvement({c.name: c for c in comparisons}, config),
            selection_explained(selection),
            replies_end(tuned.unfinished, len(test.positions), config),
        ),
        volatile=("plots/",),
        evidence={
            **_plots(b.out, comparisons, selection),
            "base_vs_tuned": markdown(comparison_markdown(comparisons)),
            "checkpoints": table(checkpoint_rows(selection)),
            "choice": text(selection.why),
            "samples": table(shown),
            **{
                f"tuned_{c.name}": number(c.tuned.value) for c in comparisons if not math.isnan(c.tuned.value)
            },
            **{f"base_{c.name}": number(c.base.value) for c in comparisons if not math.isnan(c.base.value)},
        },
    )


def checkpoints_of(trained: Artifact) -> dict[int, Path]:
    """{step: folder} of the checkpoints of a training, by step.

    Raises:
        InputError: There are none.
    """
    found = {
        int(p.name.removeprefix("checkpoint-")): p
        for p in trained.path.glob("checkpoint-*")
        if (p / "bundle.json").is_file()
    }
    if not found:
        raise InputError(f"{trained.manifest.asset}: no checkpoint in {trained.path}; materialize it again")
    return dict(sorted(found.items()))


def side_of(tokenized: Artifact, name: str, config: EvaluationConfig, generated: bool) -> Side:
    """A held-out side; without graders nothing is generated."""
    parts = tokenized.parts(name)
    return Side(name, parts, chosen_positions(parts, config.max_rows) if generated else [])


def check_side(side: Side, graders: Sequence[Grader], report: Reporter) -> dict[str, int]:
    """For each grader, how many expected completions it cannot grade against; told as a warning."""
    if not side.positions:
        return {}
    counts = check_expected(
        graders, [(r.row_id, r.completion) for r in held_out_rows(side.parts, side.positions)]
    )
    if line := graded_rows(counts, len(side.positions)):
        report.log(f"{side.name}: {line}", level="warning")
    return counts


def _judge_checkpoints(
    models: Models,
    side: Side,
    config: EvaluationConfig,
    graders: Sequence[Grader],
    speech: Speech,
    samples: SamplesWriter,
    report: Reporter,
) -> dict[int, Judgement]:
    judged = {}
    for step in models.checkpoints:
        found = judge(
            models.tuned(step),
            side,
            config,
            graders,
            speech,
            report,
            name=f"evaluating step {step}",
            keep=samples.keeper(side.name, step),
        )
        judged[step] = found
        values = {"val_loss": found.loss, **found.means()}
        report.metrics({f"validation/{k}": v for k, v in values.items() if not math.isnan(v)}, step=step)
        report.log(
            f"step {step}: "
            + ", ".join(f"{k} {v:.4g}" for k, v in values.items())
            + (f", {found.unfinished} replies cut" if found.unfinished else "")
        )
    return judged


def _choose(judged: Mapping[int, Judgement], config: EvaluationConfig) -> Selection:
    candidates = [Candidate(step, {**j.means(), "val_loss": j.loss}) for step, j in judged.items()]
    return select(candidates, [Gate.parse(g) for g in config.gates], config.rank_by)


def _judge_test(
    models: Models,
    step: int,
    side: Side,
    config: EvaluationConfig,
    graders: Sequence[Grader],
    speech: Speech,
    samples: SamplesWriter,
    report: Reporter,
) -> tuple[Judgement, Judgement, list[dict[str, Any]]]:
    """(tuned, base, a few samples with both replies)."""
    kept: list[dict[str, Any]] = []
    keep = samples.keeper(side.name, step)

    def keep_tuned(rows: list[dict[str, Any]]) -> None:
        keep(rows)
        kept.extend(rows if len(kept) < 1000 else [])

    tuned = judge(
        models.tuned(step),
        side,
        config,
        graders,
        speech,
        report,
        name=f"test side, step {step}",
        keep=keep_tuned,
    )
    shown = some_samples(kept)
    wanted = {s["row_id"]: s for s in shown}
    keep_base = samples.keeper(side.name, None)

    def add_base(rows: list[dict[str, Any]]) -> None:
        keep_base(rows)
        for row in rows:
            if row["row_id"] in wanted:
                wanted[row["row_id"]]["base_reply"] = row["reply"]

    with models.base() as model:
        base = judge(model, side, config, graders, speech, report, name="test side, base", keep=add_base)
    return tuned, base, shown


def compare_sides(
    base: Judgement, tuned: Judgement, side: Side, graders: Sequence[Grader], config: EvaluationConfig
) -> list[Comparison]:
    """One comparison for each grader, on the generated rows, and one of the loss, on all rows."""
    groups = _groups(side.parts)
    generated = [groups[p] for p in side.positions]
    found = [
        compare(g.name, base.scores[g.name], tuned.scores[g.name], generated, seed=config.decoding.seed)
        for g in graders
    ]
    loss = compare(
        TEST_LOSS,
        base.nll,
        tuned.nll,
        groups,
        weights=base.tokens,
        lower_is_better=True,
        seed=config.decoding.seed,
    )
    return [*found, loss]


def _groups(parts: Sequence[Path]) -> list[str]:
    import pyarrow.parquet as pq

    return [g for part in parts for g in pq.read_table(part, columns=["group"]).column(0).to_pylist()]


def _report_test(
    comparisons: Sequence[Comparison], step: int, shown: list[dict[str, Any]], report: Reporter
) -> None:
    values: dict[str, float] = {}
    for c in comparisons:
        values |= {
            f"test/base_{c.name}": c.base.value,
            f"test/tuned_{c.name}": c.tuned.value,
            f"test/difference_{c.name}": c.difference.value,
        }
    report.metrics({k: v for k, v in values.items() if not math.isnan(v)}, step=step)
    if shown:
        report.samples(shown, step=step)


def _summary(
    config: EvaluationConfig,
    judged: Mapping[int, Judgement],
    selection: Selection,
    base: Judgement,
    tuned: Judgement,
    comparisons: Sequence[Comparison],
    sides: Sequence[Side],
    groups: Mapping[str, list[str]],
    ungradable: Mapping[str, dict[str, int]],
) -> dict[str, Any]:
    """evaluation.json. Numbers that could not be measured are null."""
    found = {c.name: c.to_json() for c in comparisons}
    table_rows = {r["step"]: r for r in checkpoint_rows(selection)}
    return {
        "format": 1,
        "chosen_step": selection.step,
        "why": selection.why,
        "gates": list(config.gates),
        "gates_passed": selection.passed,
        "rank_by": list(config.rank_by),
        "lowest_val_loss_step": selection.lowest_loss,
        "checkpoints": [
            {**table_rows[step], "unfinished": j.unfinished, "supervised_tokens": int(j.tokens.sum())}
            for step, j in judged.items()
        ],
        "base": {name: c["base"]["value"] for name, c in found.items()},
        "tuned": {name: c["tuned"]["value"] for name, c in found.items()},
        "difference": {name: c["difference"]["value"] for name, c in found.items()},
        "comparison": found,
        "sides": {
            s.name: {
                "rows": count_rows(s.parts),
                "groups": len(set(groups[s.name])),
                "generated": len(s.positions),
                "ungradable": ungradable[s.name],
            }
            for s in sides
        },
        "unfinished": {"base": base.unfinished, "tuned": tuned.unfinished},
        "decoding": json.loads(config.decoding.model_dump_json()),
        "max_new_tokens": config.max_new_tokens,
    }


def rounded(value: Any) -> Any:
    """Floats to six decimals: what lies behind them depends on how many threads summed."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return round(value, 6) if isinstance(value, float) else value


def _plots(out: Path, comparisons: Sequence[Comparison], selection: Selection) -> dict[str, Any]:
    plot_checkpoints(out / "plots" / "checkpoints.png", selection)
    found = {"scores_over_steps": plot("plots/checkpoints.png")}
    if any(np.isfinite(c.tuned.value) for c in comparisons):
        plot_comparison(
            out / "plots" / "base_vs_tuned.png", [c for c in comparisons if np.isfinite(c.tuned.value)]
        )
        found = {"base_vs_tuned_plot": plot("plots/base_vs_tuned.png"), **found}
    return found
