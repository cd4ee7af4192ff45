"""Builds evaluation: judges every checkpoint on the validation split, chooses one, compares it with the base
on test.

The test split is read once, for the chosen checkpoint and the base, after the choice.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from sft_pipeline.graders.graders import Grader, check_expected, make_graders
from sft_pipeline.reporting import Reporter
from sft_pipeline.stages.evaluation import report
from sft_pipeline.stages.evaluation.compare import PairedComparison, compare
from sft_pipeline.stages.evaluation.config import EvaluationConfig, EvaluationStageConfig
from sft_pipeline.stages.evaluation.judge import (
    CheckpointModels,
    HeldOutSplit,
    Judge,
    Judgement,
    SamplesWriter,
    checkpoints_of,
    validation_loss,
)
from sft_pipeline.stages.evaluation.select import Candidate, Gate, Selection, better, select
from sft_pipeline.stages.stage import Build, Built, Check, number, table
from sft_pipeline.store import Artifact
from sft_pipeline.store.files import write_json
from sft_pipeline.tables.held_out import held_out_rows
from sft_pipeline.tables.parquet import FileWriter, read_batches
from sft_pipeline.text.reply import ReplyDecoder
from sft_pipeline.training.config import ModelConfig
from sft_pipeline.training.logits import LOSS_TOLERANCE, free_memory, loss_difference

TEST_LOSS = "test_loss"  # on the test split, what is `val_loss` on the validation split
MAX_UNFINISHED = 0.05


def build(b: Build) -> Built:
    """Writes evaluation.json, samples.parquet and test_losses.parquet."""
    stage_config: EvaluationStageConfig = b.config
    config = stage_config.evaluation
    tokenized = b.inputs["tokenized_rows"]
    checkpoints = checkpoints_of(b.inputs["trained_checkpoints"])
    graders = make_graders(config.graders)
    validation, test = (HeldOutSplit.of(tokenized, name, config) for name in ("validation", "test"))
    decoder = ReplyDecoder.of(tokenized)
    ungradable = {s.name: _ungradable(s, graders, decoder, b.report) for s in (validation, test)}
    precision = _precision_of(b.inputs["trained_checkpoints"])
    four_bit = _four_bit_losses(stage_config.model, checkpoints, precision, validation, b.report)
    models = CheckpointModels(stage_config.model, checkpoints, precision)
    with SamplesWriter(b.out / "samples.parquet", graders) as samples:
        judge = Judge(config, graders, decoder, samples, b.report).judge
        judged: dict[int, Judgement] = {}
        for step in checkpoints:
            judged[step] = judge(models.tuned(step), validation, step, f"evaluating step {step}")
            report.checkpoint_judged(b.report, step, judged[step])
        candidates = [Candidate(step, j.measures()) for step, j in judged.items()]
        selection = select(candidates, [Gate.parse(g) for g in config.gates], config.rank_by)
        b.report.log(f"chosen: {selection.why}")
        step = selection.step
        tuned = judge(models.tuned(step), test, step, f"test split, step {step}")
        with models.base() as model:
            base = judge(model, test, None, "test split, base")
    _write_test_losses(b.out / "test_losses.parquet", test, base, tuned)
    comparisons = _compare_on_test(base, tuned, test, graders, config)
    groups = {s.name: len(set(s.groups())) for s in (validation, test)}
    found = {c.name: c.to_json() for c in comparisons}
    rows = {r["step"]: r for r in selection.to_json()}
    evaluation = {
        "format": 1,
        "chosen_step": step,
        "why": selection.why,
        "gates": list(config.gates),
        "gates_passed": selection.passed,
        "rank_by": list(config.rank_by),
        "lowest_val_loss_step": selection.lowest_loss,
        "checkpoints": [
            {**rows[step], "unfinished": j.unfinished, "supervised_tokens": int(j.tokens.sum())}
            for step, j in judged.items()
        ],
        "base": {name: c["base"]["value"] for name, c in found.items()},
        "tuned": {name: c["tuned"]["value"] for name, c in found.items()},
        "difference": {name: c["difference"]["value"] for name, c in found.items()},
        "comparison": found,
        "sides": {
            s.name: {
                "rows": s.rows,
                "groups": groups[s.name],
                "generated": len(s.positions),
                "ungradable": ungradable[s.name],
            }
            for s in (validation, test)
        },
        "unfinished": {"base": base.unfinished, "tuned": tuned.unfinished},
        "decoding": json.loads(config.decoding.model_dump_json()),
        "max_new_tokens": config.max_new_tokens,
    }
    write_json(b.out / "evaluation.json", _rounded(evaluation))
    return Built(
        counts={
            "checkpoints": len(judged),
            "validation_rows": validation.rows,
            "validation_generated": len(validation.positions),
            "test_rows": test.rows,
            "test_groups": groups["test"],
            "test_generated": len(test.positions),
            "unfinished_base": base.unfinished,
            "unfinished_tuned": tuned.unfinished,
            "chosen_step": selection.step,
        },
        checks=(
            judged_is_trained(
                b.inputs["trained_checkpoints"],
                {step: j.measures()["val_loss"] for step, j in judged.items()},
                four_bit,
            ),
            gates_passed(selection, config, validation.rows),
            improvement({c.name: c for c in comparisons}, config),
            selection_explained(selection),
            replies_end(tuned.unfinished, len(test.positions), config),
        ),
        volatile=("plots/", "test_losses.parquet"),  # its last digits depend on how many threads summed
        evidence=report.evidence(b.out, comparisons, selection, b.report),
    )


def build_trial_judgement(b: Build) -> Built:
    """Judges one training's last checkpoint on the validation split: what a sweep compares. Test is not read.

    Writes judgement.json (null for what could not be measured) and samples.parquet.
    """
    stage_config: EvaluationStageConfig = b.config
    config = stage_config.evaluation
    tokenized = b.inputs["tokenized_rows"]
    checkpoints = checkpoints_of(b.inputs["trial_training"])
    step = max(checkpoints)
    graders = make_graders(config.graders)
    split = HeldOutSplit.of(tokenized, "validation", config)
    decoder = ReplyDecoder.of(tokenized)
    ungradable = _ungradable(split, graders, decoder, b.report)
    precision = _precision_of(b.inputs["trial_training"])
    model = CheckpointModels(stage_config.model, checkpoints, precision).tuned(step)
    with SamplesWriter(b.out / "samples.parquet", graders) as samples:
        judge = Judge(config, graders, decoder, samples, b.report)
        judgement = judge.judge(model, split, step, "judging on the validation split")
    # JSON has no NaN.
    measures = {k: None if math.isnan(v) else v for k, v in judgement.measures().items()}
    found = {
        "format": 1,
        "step": step,
        "scores": measures,
        "rows": split.rows,
        "generated": len(split.positions),
        "unfinished": judgement.unfinished,
        "ungradable": ungradable,
    }
    write_json(b.out / "judgement.json", _rounded(found))
    return Built(
        counts={
            "validation_rows": split.rows,
            "validation_generated": len(split.positions),
            "unfinished": judgement.unfinished,
            "step": step,
        }
    )


def _ungradable(
    split: HeldOutSplit, graders: Sequence[Grader], decoder: ReplyDecoder, reporter: Reporter
) -> dict[str, int]:
    """For each grader, how many expected completions it cannot grade against; logged as a warning."""
    if not split.positions:
        return {}
    rows = held_out_rows(split.parts, split.positions)
    counts = check_expected(graders, [(r.row_id, decoder.expected(r.target, r.completion)) for r in rows])
    if found := [f"{name} {n}" for name, n in counts.items() if n]:
        reporter.log(
            f"{split.name}: expected completions that a grader cannot grade against (they score 0), "
            f"of {len(split.positions)}: {', '.join(found)}",
            "warning",
        )
    return counts


def _write_test_losses(path: Path, test: HeldOutSplit, base: Judgement, tuned: Judgement) -> None:
    """The loss of each test row, by which a later model can be compared with this one on the rows they share.

    Columns: row_id, and float64 base and tuned (summed NLL in nats) and weight (of its tokens).
    """
    columns = {"base": base.nll, "tuned": tuned.nll, "weight": tuned.weight}
    schema = pa.schema([("row_id", pa.string()), *((name, pa.float64()) for name in columns)])
    done = 0
    with FileWriter(path, schema) as writer:
        for batch in read_batches(test.parts, ["row_id"]):
            rows = slice(done, done := done + batch.num_rows)
            values = [pa.array(of_rows[rows]) for of_rows in columns.values()]
            writer.write(pa.record_batch([batch.column(0), *values], schema=schema))


def _compare_on_test(
    base: Judgement, tuned: Judgement, test: HeldOutSplit, graders: Sequence[Grader], config: EvaluationConfig
) -> list[PairedComparison]:
    """One comparison for each grader, on the generated rows, and one of the loss, on all rows."""
    groups, seed = test.groups(), config.decoding.seed
    generated = [groups[p] for p in test.positions]
    found = [
        compare(g.name, base.scores[g.name], tuned.scores[g.name], generated, seed=seed) for g in graders
    ]
    loss = compare(
        TEST_LOSS, base.nll, tuned.nll, groups, weights=base.weight, lower_is_better=True, seed=seed
    )
    return [*found, loss]


def _rounded(value: Any) -> Any:
    """Floats to six decimals: what lies behind them depends on how many threads summed."""
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return round(value, 6) if isinstance(value, float) else value


def _precision_of(trained: Artifact) -> str:
    """In which the training computed: bf16, fp16 or fp32."""
    return json.loads(trained.file("training.json").read_text(encoding="utf-8"))["model"]["precision"]


def _four_bit_losses(
    model: ModelConfig,
    checkpoints: dict[int, Path],
    precision: str,
    validation: HeldOutSplit,
    report: Reporter,
) -> dict[int, float]:
    """For QLoRA the validation loss of each checkpoint as it was trained, on the 4-bit base."""
    if model.parameterization != "qlora":
        return {}
    models = CheckpointModels(model, checkpoints, precision, as_trained=True)
    found = {
        step: validation_loss(models.tuned(step), validation, report, f"4-bit loss of step {step}")
        for step in checkpoints
    }
    del models
    free_memory()  # the unquantized base comes next
    return found


def judged_is_trained(
    trained: Artifact, judged: Mapping[int, float], four_bit: Mapping[int, float] | None = None
) -> Check:
    """Blocking: the checkpoints have the validation losses that training recorded for them.

    Args:
        judged: Of the models that are judged and exported, by step.
        four_bit: Where these are not the models that were trained (QLoRA): of those that were.
    """
    training = json.loads(trained.file("training.json").read_text(encoding="utf-8"))
    recorded = {c["step"]: c["val_loss"] for c in training.get("checkpoints", ())}
    precision = training["model"]["precision"]
    rows = []
    for step, loss in (four_bit or judged).items():
        before = recorded.get(step)
        if before is not None:  # a loss that is no number here was one in training: as wrong as any
            off = loss_difference(loss, before)
            rows.append({"step": step, "training": before, "evaluation": loss, "off": off})
            if four_bit:
                rows[-1] |= {"exported": judged[step]}
    wrong = [
        r
        for r in rows
        if not (r["off"] <= LOSS_TOLERANCE[precision] and math.isfinite(r.get("exported", 0.0)))
    ]
    if not rows:
        return Check("judged_is_trained", True, "training recorded no validation loss to compare with")
    if wrong:
        first = wrong[0]
        judged_loss = f"{first['evaluation']:.4f}"
        if four_bit:
            judged_loss = f"{first['exported']:.4f}, and on the 4-bit base {judged_loss}"
        description = (
            f"step {first['step']}: training recorded a validation loss of {first['training']:.4f}, the "
            f"model that is judged has {judged_loss} ({len(wrong)} of {len(rows)} checkpoints "
            f"differ by more than {LOSS_TOLERANCE[precision]:g}): it is another model than was trained. "
            "Files changed since, or an adapter that cannot be merged into this base look like this"
        )
    else:
        worst = max(r["off"] for r in rows)
        description = (
            f"the validation losses of {len(rows)} checkpoints are those that training recorded, to "
            f"{worst:.1e} (at most {LOSS_TOLERANCE[precision]:g} for {precision})"
        )
    if four_bit and not wrong:
        far = max(rows, key=lambda r: abs(r["exported"] - r["evaluation"]))
        description += (
            f"; on the unquantized base, as the models are judged and exported, they differ from it by at "
            f"most {abs(far['exported'] - far['evaluation']):.4f} (step {far['step']}: {far['exported']:.4f})"
        )
    shown = [{k: v if math.isfinite(v) else str(v) for k, v in row.items()} for row in rows]
    return Check("judged_is_trained", not wrong, description, {"losses": table(shown)})


def gates_passed(selection: Selection, config: EvaluationConfig, rows: int) -> Check:
    """Blocking: the chosen checkpoint passes every gate, measured on the validation split of so many rows."""
    chosen = next(r for r in selection.table if r["step"] == selection.step)
    gates = ", ".join(config.gates)
    if not config.gates:
        description = f"no gates are set; step {selection.step} was chosen: {selection.why}"
    elif not rows:
        description = (
            f"the validation split has no rows, so that no checkpoint can be judged against {gates}: "
            "raise split.validation"
        )
    elif selection.passed:
        names = dict.fromkeys(g.split()[0] for g in config.gates)
        scores = ", ".join(f"{name} {chosen[name]:.4g}" for name in names)
        description = f"step {selection.step} passes {gates} with {scores}"
    else:
        description = selection.why
    return Check("gates_passed", selection.passed, description, {"checkpoints": table(selection.table)})


def improvement(comparisons: Mapping[str, PairedComparison], config: EvaluationConfig) -> Check:
    """Blocking: the chosen checkpoint is strictly better than the base on the first ranking term, on test."""
    term = config.rank_by[0]
    name = term.lstrip("-")
    found = comparisons[TEST_LOSS if name == "val_loss" else name]
    base, tuned, difference = found.base, found.tuned, found.difference
    if math.isnan(tuned.value):
        passed, evidence = False, {}
        description = f"{found.name} cannot be measured: the test split has no rows. Raise split.test"
    else:
        passed = better(tuned.value, base.value, term)
        values = found.to_json()
        row = {"measure": found.name, **values["difference"], "p_value": values["p_value"]}
        row |= {"wins": found.wins, "losses": found.losses, "ties": found.ties}
        evidence = {"base": number(base.value), "tuned": number(tuned.value), "difference": table([row])}
        word = "below" if found.lower_is_better else "above"
        description = (
            f"tuned {tuned.value:.4g} is {'' if passed else 'not '}{word} "
            f"base {base.value:.4g} on {found.name} ({found.rows} test rows, {found.groups} groups; "
            f"difference {difference.value:+.4g}, "
            f"95 % interval {difference.low:+.4g} to {difference.high:+.4g}; "
            f"{found.wins} better, {found.losses} worse, p = {found.p_value:.2g})"
        )
    if not config.require_improvement:
        passed = True
        description = f"not required (evaluation.require_improvement is false): {description}"
    return Check("improvement", passed, description, evidence)


def selection_explained(selection: Selection) -> Check:
    """Informational: the choice in words, and whether the lowest loss would have chosen differently."""
    note = "; it also has the lowest val_loss" if selection.lowest_loss == selection.step else ""
    return Check("selection_explained", True, selection.why + note, {"checkpoints": table(selection.table)})


def replies_end(unfinished: int, generated: int, config: EvaluationConfig) -> Check:
    """A warning: replies that were cut are graded as they are, so that a limit too low costs score."""
    share = unfinished / generated if generated else 0.0
    description = (
        f"{unfinished} of {generated} test replies of the tuned model were cut "
        f"at max_new_tokens {config.max_new_tokens}"
    )
    if share > MAX_UNFINISHED:
        description += (
            "; they were graded as they are. Raise evaluation.max_new_tokens, "
            "or see whether the model learned to stop"
        )
    evidence = {"unfinished": number(unfinished), "share": number(share)}
    return Check("replies_end", share <= MAX_UNFINISHED, description, evidence)
