"""Builds sanity_check: runs the protocol on a throw-away copy of the model and writes the verdict.

    data          ids, labels and formatting against the model; no weights are loaded
    boundaries, causal    the probe on the loaded model
    overfits, short_run_stable, samples    the trials, on the same copy
    exportable    that copy saved, exported and loaded again

torch is imported after the data check, and trl after the probe: a skipped or failed check does not wait for
them.
"""

import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from sft_pipeline.errors import InputError
from sft_pipeline.stages.sanity_check import report
from sft_pipeline.stages.sanity_check.checks import CHECKS, PROBE_CHECKS
from sft_pipeline.stages.sanity_check.config import SanityCheckConfig
from sft_pipeline.stages.sanity_check.exported_tokenizer import compare_exported_tokenizer
from sft_pipeline.stages.sanity_check.labels import DataFindings, changed_formatting, check_blocks
from sft_pipeline.stages.stage import Build, Built, Check, CheckSpec, Evidence, plot, table
from sft_pipeline.store.files import write_json
from sft_pipeline.text.reply import formatting_of
from sft_pipeline.training.reporters import require_reporters

if TYPE_CHECKING:
    from sft_pipeline.training.data import Layout
    from sft_pipeline.training.shards import Shards


@dataclass
class SanityVerdict:
    """What has been found so far.

    Attributes:
        record: What goes into sanity.json.
    """

    checks: dict[str, Check] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    evidence: dict[str, Evidence] = field(default_factory=dict)

    def add(self, name: str, passed: bool, description: str, **evidence: Evidence) -> None:
        """The outcome of one check."""
        self.checks[name] = Check(name, passed, description, evidence)


def build(b: Build) -> Built:
    """The whole protocol. Writes sanity.json, and forecast.json where the trials ran.

    Raises:
        InputError: A package that the training is to report with is not installed.
    """
    require_reporters(b.config.training)
    verdict = SanityVerdict()
    if b.config.sanity.skip:
        verdict.evidence |= report.plot_learning_rate(b, b.config)
    return _judge(b, verdict, CHECKS, _trials)


def build_probe(b: Build) -> Built:
    """What depends on data and model alone, for a sweep's trials: labels, vocabulary, boundary probe."""
    return _judge(b, SanityVerdict(), PROBE_CHECKS, _probed_copy)


def _judge(
    b: Build,
    verdict: SanityVerdict,
    specs: Sequence[CheckSpec],
    trials: Callable[[Build, SanityCheckConfig, SanityVerdict], Any],
) -> Built:
    """Labels and vocabulary, then the trials where those are right; every declared check has an outcome."""
    config: SanityCheckConfig = b.config
    data = DataFindings()
    if config.sanity.skip:
        b.report.log("the sanity check is skipped by sanity.skip", "warning")
        for spec in specs:
            verdict.add(spec.name, True, "Not run: sanity.skip is set in the recipe.")
        verdict.record["skipped"] = True
    else:
        data = _check_data(b, config, verdict)
        if all(c.passed for c in verdict.checks.values()):
            _run_trials(b, config, verdict, specs, trials)
    for spec in specs:
        if spec.name not in verdict.checks:
            verdict.add(spec.name, False, "Not run, since an earlier check failed.")
    checks = tuple(verdict.checks[spec.name] for spec in specs)
    verdict.record["checks"] = {c.name: {"passed": c.passed, "words": c.description} for c in checks}
    verdict.record["passed"] = all(verdict.checks[s.name].passed for s in specs if s.blocking)
    write_json(b.out / "sanity.json", _plain(verdict.record))
    return Built(
        counts={
            "tokens": data.tokens,
            "supervised_tokens": data.supervised,
            "checks_failed": sum(not c.passed for c in checks),
        },
        checks=checks,
        volatile=("plots/", "forecast.json"),
        evidence=verdict.evidence,
    )


def _run_trials(
    b: Build,
    config: SanityCheckConfig,
    verdict: SanityVerdict,
    specs: Sequence[CheckSpec],
    trials: Callable[[Build, SanityCheckConfig, SanityVerdict], Any],
) -> None:
    """Runs them; an error of a library under way is the outcome of the first check that has none.

    What a family of models cannot do raises whatever it does in the library that tries it. A configuration
    that cannot work at all and memory that does not suffice are reported as they are everywhere.
    """
    try:
        trials(b, config, verdict)
    except (AssertionError, AttributeError, LookupError, NotImplementedError, TypeError, ValueError) as error:
        failure: Exception = error
    except RuntimeError as error:
        import torch

        if isinstance(error, torch.OutOfMemoryError):
            raise
        failure = error
    else:
        return
    name = next((s.name for s in specs if s.name not in verdict.checks), specs[-1].name)
    b.report.log("".join(traceback.format_exception(failure)), "error")
    verdict.add(
        name,
        False,
        f"The model fails here: {type(failure).__name__}: {str(failure)[:500]}. Try another model.attention, "
        "packing.strategy: none or model.parameterization; the log has the whole error",
    )


def _check_data(b: Build, config: SanityCheckConfig, verdict: SanityVerdict) -> DataFindings:
    from sft_pipeline.training.base import load_model_config

    packed, formatting = b.inputs["packed_shards"], formatting_of(b.inputs["tokenized_rows"])
    model = load_model_config(config.model).get_text_config()
    parts = {split: packed.parts(split) for split in ("train", "validation")}
    found = check_blocks(parts, model.vocab_size, b.report)
    offenders = {"rows": table(found.offenders)} if found.offenders else {}
    positions = getattr(model, "max_position_embeddings", None)
    problems = []
    if found.outside_vocabulary:
        problems.append(
            f"{found.outside_vocabulary:,} ids are outside the model's vocabulary of {model.vocab_size:,} "
            f"(the highest is {found.highest_id:,}): tokenizer and model do not belong together"
        )
    if positions and found.longest > positions:
        problems.append(
            f"the longest example has {found.longest:,} tokens, the model {positions:,} positions: "
            f"lower tokens.max_length to {positions}"
        )
    if formatting.get("vocab_size", 0) > model.vocab_size and not problems:
        b.report.log(
            f"the tokenizer has {formatting['vocab_size']:,} ids, the model {model.vocab_size:,}: "
            "some text could not be encoded for it",
            "warning",
        )
    description = (
        f"{found.tokens:,} ids are inside the vocabulary of {model.vocab_size:,}; "
        f"the longest example has {found.longest:,} tokens."
    )
    verdict.add("ids_in_vocabulary", not problems, "; ".join(problems) or description, **offenders)
    problems = changed_formatting(
        formatting, config.tokenizer, config.tokenizer_revision, config.template, config.tokens
    )
    if found.mismatched_labels:
        problems.append(
            f"{found.mismatched_labels:,} labels are not the id at their own position "
            "(labels shifted by one look like this): pack the rows anew"
        )
    if found.without_supervision:
        problems.append(f"{found.without_supervision:,} examples have no supervised token")
    if not found.tokens:
        problems.append("there is no block to train on")
    description = (
        f"{found.supervised:,} labels equal their input ids; "
        "template, tokenizer and mask are those of the rows."
    )
    verdict.add("labels_match", not problems, "; ".join(problems) or description, **offenders)
    good, description, different = compare_exported_tokenizer(config, b.inputs["tokenized_rows"])
    rows = {"different": table(different[:10])} if different else {}
    verdict.add("exported_tokenizer", good, description, **rows)
    _check_graders(b, config, verdict)
    verdict.record["data"] = {k: v for k, v in asdict(found).items() if k != "offenders"}
    return found


def _check_graders(b: Build, config: SanityCheckConfig, verdict: SanityVerdict) -> None:
    """Runs the graders on expected completions, and on replies that fit nothing."""
    from sft_pipeline.graders.trial import try_graders

    evaluation = config.evaluation
    try:
        scores = try_graders(evaluation.graders, b.inputs["tokenized_rows"], evaluation.max_rows)
    except InputError as error:
        verdict.add("graders_run", False, str(error))
        return
    verdict.record["graders"] = scores
    description = (
        f"They ran: {', '.join(s['grader'] for s in scores)}." if scores else "The recipe has no graders."
    )
    if never := [row["grader"] for row in scores if row["expected_completions"] == 0]:
        description += f" 0 for every expected completion that was tried: {', '.join(never)}"
        b.report.log(description, "warning")
    verdict.add("graders_run", True, description, **({"scores": table(scores)} if scores else {}))


def _probed_copy(
    b: Build, config: SanityCheckConfig, verdict: SanityVerdict
) -> tuple[Any, str, "Shards", "Layout"]:
    """Loads a throw-away copy of the model, and probes whether it keeps the examples of a block apart.

    The packed layout is probed wherever blocks hold several examples, whatever this device uses, and the one
    in use.

    Returns:
        (the copy, its precision, the training blocks, their layout on this device).
    """
    from sft_pipeline.stages.sanity_check.probe import sees_ahead
    from sft_pipeline.training.data import layout_for
    from sft_pipeline.training.model import load_for_training, training_device
    from sft_pipeline.training.process import be_deterministic
    from sft_pipeline.training.shards import Shards

    be_deterministic(config.training.seed)
    b.report.log(f"loading {config.model.base}")
    model, loaded = load_for_training(config.model, config.training, device=training_device())
    shards = Shards(b.inputs["packed_shards"].parts("train"))
    layout = layout_for(training_device(), loaded.attention)
    verdict.record["model"] = loaded.as_dict()
    _probe_boundaries(b, verdict, model, shards, layout)
    moved, causal = sees_ahead(model, shards)
    if causal:
        description = f"Changing an example's second half moves predictions of its first by {moved:.1e} nats."
    else:
        description = (
            f"Changing an example's second half moves predictions of its first half by {moved:.2g} nats: "
            f"{loaded.architecture} sees the tokens that it is to predict, so that its loss means nothing. "
            "Take a causal model (is_decoder: true in a BERT's config.json, no bidirectional attention)"
        )
    verdict.add("causal", causal, description)
    return model, loaded.precision, shards, layout


def _probe_boundaries(
    b: Build, verdict: SanityVerdict, model: Any, shards: "Shards", layout: "Layout"
) -> None:
    """Whether the model keeps the examples of a block apart."""
    from sft_pipeline.stages.sanity_check.probe import collate_as, probe, probe_block

    block = probe_block(shards)
    if block is None:
        verdict.add("boundaries", True, "There is only one example: nothing to be seen across a boundary.")
        return
    packing = any(len(shards.block(i).lengths) > 1 for i in range(min(len(shards), 64)))
    layouts: list[Layout] = ["packed", layout] if packing and layout != "packed" else [layout]
    probes = [probe(model, block, name, collate_as(name)) for name in layouts]
    verdict.record["boundaries"] = [asdict(p) for p in probes]
    leaking = next((p for p in probes if not p.passed), None)
    if leaking:
        description = (
            f"Examples of a block see each other (layout {leaking.layout}): {leaking.cause}. "
            f"Remedy: {leaking.remedy}"
        )
    else:
        most = max((p.most_moved for p in probes), default=0.0)
        description = (
            f"No example sees another ({', '.join(layouts)}): changing one moves others by at most "
            f"{most:.1e} nats, and packed loss equals unpacked loss."
        )
    rows = [row for p in probes for row in p.rows()]
    verdict.add("boundaries", leaking is None, description, **({"differences": table(rows)} if rows else {}))
    b.report.log(description, "error" if leaking else "info")


def _trials(b: Build, config: SanityCheckConfig, verdict: SanityVerdict) -> None:
    """Probe, overfitting, short run and samples, in that order, on one throw-away copy."""
    verdict.evidence |= report.plot_learning_rate(b, config)
    model, precision, shards, layout = _probed_copy(b, config, verdict)
    if not (verdict.checks["boundaries"].passed and verdict.checks["causal"].passed):
        return
    import torch

    from sft_pipeline.stages.sanity_check import protocol
    from sft_pipeline.training.base import load_tokenizer
    from sft_pipeline.training.data import make_feed
    from sft_pipeline.training.generate import make_sampler
    from sft_pipeline.training.schedule import Schedule
    from sft_pipeline.training.shards import Plan, Shards

    packed, tokenized = b.inputs["packed_shards"], b.inputs["tokenized_rows"]
    sanity, training = config.sanity, config.training
    plan = Plan(packed.file("plan.parquet"))
    feed = make_feed(shards, plan, training, layout=layout, updates=len(plan))
    trained = [p for p in model.parameters() if p.requires_grad]
    # Kept on the CPU: a second copy of the trained weights need not fit beside the model on a GPU.
    start = [p.detach().to("cpu", copy=True) for p in trained]
    # Before the optimizer has its moments, whose size is known without a trial.
    worst = protocol.fullest_microbatch(model, shards, feed, verdict.record["data"]["fullest"])

    overfit = protocol.overfit(
        model,
        protocol.overfit_rows(shards, feed, sanity.overfit_rows),
        steps=sanity.overfit_steps,
        fraction=sanity.overfit_loss,
        adapters=config.model.parameterization != "full",
        max_tokens=feed.max_tokens,
        clip=training.clip,
        report=b.report,
    )
    verdict.add("overfits", overfit.passed, str(overfit), losses=plot("plots/overfit.png"))
    verdict.record["overfit"] = asdict(overfit)
    verdict.evidence |= report.plot_overfit(b, overfit)
    b.report.log(str(overfit))
    with torch.no_grad():
        for p, s in zip(trained, start, strict=True):
            p.copy_(s)

    validation = packed.parts("validation")
    held_out = Shards(validation, most=protocol.EVALUATION_BLOCKS) if validation else None
    tokenizer = load_tokenizer(config.model)
    run = protocol.short_run(
        model,
        feed,
        held_out if held_out is not None and len(held_out) else None,
        tokenizer,
        config.model,
        training,
        steps=sanity.short_run_steps,
        precision=precision,
        folder=b.work / "trainer",
        report=b.report,
    )
    rate = Schedule.of(training, config.model).peak
    problems = run.problems()
    if problems:
        description = (
            f"At a learning rate of {rate:g} the short run is unstable: {'; '.join(problems)}. "
            "Lower training.learning_rate"
        )
    else:
        ends = f", validation {run.val_loss[0][1]:.3f} to {run.val_loss[-1][1]:.3f}" if run.val_loss else ""
        losses = f"loss {run.loss[0][1]:.3f} to {run.loss[-1][1]:.3f}{ends}"
        description = f"{len(run.loss)} updates at up to {rate:g}: {losses}."
    verdict.add("short_run_stable", not problems, description, curves=plot("plots/short_run.png"))
    verdict.record["short_run"] = {
        "loss": run.loss,
        "val_loss": run.val_loss,
        "grad_norm": run.grad_norm,
        "problems": problems,
        "learning_rate": rate,
        "stride": run.stride,
    }
    verdict.evidence |= report.plot_short_run(b, run)
    b.report.log(description, "error" if problems else "info")

    if sanity.samples:
        parts = tokenized.parts("validation") or tokenized.parts("train")
        samples = make_sampler(
            model, tokenizer, parts, formatting_of(tokenized), sanity.samples, new_tokens=64
        )()
        b.report.samples(samples, sanity.short_run_steps)
        replied = sum(bool(str(row["reply"]).strip()) for row in samples)
        ended = sum(bool(row["finished"]) for row in samples)
        description = f"{replied} of {len(samples)} replies say something, {ended} end by themselves."
        rows = [{k: str(v)[:400] for k, v in row.items()} for row in samples]
        evidence = {"replies": table(rows)} if rows else {}
        verdict.add("samples", bool(replied) or not samples, description, **evidence)
        verdict.record["samples"] = samples
    else:
        verdict.add("samples", True, "None asked for (sanity.samples is 0).")
    parameters = sum(p.numel() for p in trained)
    verdict.evidence |= report.write_forecast(b, config, run.seconds, worst, parameters)
    if problems:  # what spoiled weights give says nothing
        return
    from sft_pipeline.stages.sanity_check.export_trial import export_trial, save_trial

    saved = save_trial(model, config, tokenized, b.work / "export", precision)
    del model, trained, start  # the next one need not fit beside it
    b.report.log("exporting the short run's model")
    passed, description = export_trial(saved, config, tokenized)
    verdict.add("exportable", passed, description)


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: written as text."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    return value
