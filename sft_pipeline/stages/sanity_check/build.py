"""Builds sanity_check: runs the protocol on a throw-away copy of the model and writes the verdict."""

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from sft_pipeline.errors import InputError
from sft_pipeline.plots import training as plots
from sft_pipeline.stages.sanity_check.asset import STAGE
from sft_pipeline.stages.sanity_check.config import SanityCheckConfig
from sft_pipeline.stages.sanity_check.labels import DataFindings, changed_formatting, check_blocks
from sft_pipeline.stages.stage import Build, Built, Check, CheckSpec, Evidence, markdown, number, plot, table
from sft_pipeline.store.files import write_json

if TYPE_CHECKING:
    from sft_pipeline.training.data import Layout
    from sft_pipeline.training.shards import Shards


@dataclass
class Verdict:
    """What has been found out so far; the trials fill it in."""

    checks: dict[str, Check] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    evidence: dict[str, Evidence] = field(default_factory=dict)

    def say(self, name: str, passed: bool, words: str, **evidence: Evidence) -> None:
        self.checks[name] = Check(name, passed, words, evidence)


def build(b: Build) -> Built:
    """Every declared check is reported, also those that could not be asked because an earlier one failed."""
    config: SanityCheckConfig = b.config
    verdict = Verdict()
    if config.sanity.skip:
        _learning_rate(b, config, verdict)
    return judged(b, verdict, STAGE.checks, _trials)


def judged(
    b: Build,
    verdict: Verdict,
    specs: Sequence[CheckSpec],
    trials: Callable[[Build, SanityCheckConfig, Verdict], None],
) -> Built:
    """The verdict: labels and vocabulary, then the trials where those are right; every declared check has an outcome."""
    config: SanityCheckConfig = b.config
    data = DataFindings()
    if config.sanity.skip:
        b.report.log("the sanity check is skipped by sanity.skip", "warning")
        for spec in specs:
            verdict.say(spec.name, True, "Not run: sanity.skip is set in the recipe.")
        verdict.record["skipped"] = True
    else:
        data = _data(b, config, verdict)
        if all(c.passed for c in verdict.checks.values()):
            trials(b, config, verdict)
    for spec in specs:
        if spec.name not in verdict.checks:
            verdict.say(spec.name, False, "Not run, since an earlier check failed.")
    return _finish(b, verdict, data, specs)


def _learning_rate(b: Build, config: SanityCheckConfig, verdict: Verdict) -> None:
    """The rate of every update that the training will make, before it makes the first."""
    from sft_pipeline.training.schedule import Schedule, curve
    from sft_pipeline.training.shards import Plan

    planned = len(Plan(b.inputs["packed_shards"].file("plan.parquet")))
    total = min(planned, config.training.max_steps or planned)
    schedule = Schedule.of(config.training, config.model)
    plots.plot_curve(
        b.out / "plots" / "learning_rate.png",
        list(enumerate(curve(total, schedule), 1)),
        f"Learning rate to come: {schedule.kind}, {total:,} updates",
        "",
    )
    verdict.evidence["learning_rate_curve"] = plot("plots/learning_rate.png")


def _data(b: Build, config: SanityCheckConfig, verdict: Verdict) -> DataFindings:
    from sft_pipeline.training.base import load_model_config

    packed, tokenized = b.inputs["packed_shards"], b.inputs["tokenized_rows"]
    model = load_model_config(config.model).get_text_config()
    formatting = _formatting(tokenized)
    found = check_blocks(
        {side: packed.parts(side) for side in ("train", "validation")}, model.vocab_size, b.report
    )
    offenders = {"rows": table(found.offenders)} if found.offenders else {}
    positions = getattr(model, "max_position_embeddings", None)
    wrong = []
    if found.outside_vocabulary:
        wrong.append(
            f"{found.outside_vocabulary:,} ids are outside the model's vocabulary of {model.vocab_size:,} (the highest is {found.highest_id:,}): tokenizer and model do not belong together"
        )
    if positions and found.longest > positions:
        wrong.append(
            f"the longest example has {found.longest:,} tokens, the model {positions:,} positions: lower tokens.max_length to {positions}"
        )
    if formatting.get("vocab_size", 0) > model.vocab_size and not wrong:
        b.report.log(
            f"the tokenizer has {formatting['vocab_size']:,} ids, the model {model.vocab_size:,}: some text could not be encoded for it",
            "warning",
        )
    verdict.say(
        "ids_in_vocabulary",
        not wrong,
        "; ".join(wrong)
        or f"{found.tokens:,} ids are inside the vocabulary of {model.vocab_size:,}; the longest example has {found.longest:,} tokens.",
        **offenders,
    )
    problems = changed_formatting(
        formatting, config.tokenizer, config.tokenizer_revision, config.template, config.tokens
    )
    if found.mismatched_labels:
        problems.append(
            f"{found.mismatched_labels:,} labels are not the id at their own position (labels shifted by one look like this): pack the rows anew"
        )
    if found.without_supervision:
        problems.append(f"{found.without_supervision:,} examples have no supervised token")
    if not found.tokens:
        problems.append("there is no block to train on")
    verdict.say(
        "labels_match",
        not problems,
        "; ".join(problems)
        or f"{found.supervised:,} labels equal their input ids; template, tokenizer and mask are those of the rows.",
        **offenders,
    )
    verdict.record["data"] = {k: v for k, v in asdict(found).items() if k != "offenders"}
    return found


def _formatting(tokenized: Any) -> dict[str, Any]:
    path = tokenized.file("formatting.json")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: not readable ({error}). Delete the artifact's folder to have it rebuilt"
        ) from error


def _trials(b: Build, config: SanityCheckConfig, verdict: Verdict) -> None:
    """The schedule to come; probe, overfitting, short run and samples, in that order, on one throw-away copy."""
    import torch

    from sft_pipeline.stages.sanity_check import protocol
    from sft_pipeline.stages.sanity_check.forecast import forecast, worst_block
    from sft_pipeline.training.base import load_tokenizer
    from sft_pipeline.training.data import make_feed
    from sft_pipeline.training.shards import Plan

    _learning_rate(b, config, verdict)
    packed, sanity, training = b.inputs["packed_shards"], config.sanity, config.training
    model, precision, shards, layout = probed_copy(b, config, verdict)
    if not verdict.checks["boundaries"].passed:
        return
    plan = Plan(packed.file("plan.parquet"))
    feed = make_feed(shards, plan, training, layout=layout, updates=len(plan))
    trained = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach().to("cpu", copy=True) for p in trained]
    worst = worst_block(model, shards, feed, verdict.record["data"]["fullest"])
    rows = protocol.overfit_rows(shards, feed, sanity.overfit_rows)
    result = protocol.overfit(
        model,
        rows,
        steps=sanity.overfit_steps,
        fraction=sanity.overfit_loss,
        adapters=config.model.parameterization != "full",
        max_tokens=feed.max_tokens,
        clip=training.clip,
        report=b.report,
    )
    verdict.say("overfits", result.passed, result.words, losses=plot("plots/overfit.png"))
    verdict.record["overfit"] = asdict(result)
    plots.plot_curve(
        b.out / "plots" / "overfit.png",
        list(enumerate(result.losses)),
        f"Overfitting {result.rows} rows",
        "nats per supervised token",
    )
    b.report.log(result.words)
    with torch.no_grad():
        for p, s in zip(trained, start, strict=True):
            p.copy_(s)
    tokenizer = load_tokenizer(config.model)
    held_out = (
        protocol.FirstBlocks(packed.parts("validation"), protocol.EVALUATION_BLOCKS)
        if packed.parts("validation")
        else None
    )
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
    _judge_run(b, config, verdict, run)
    _samples(b, config, verdict, model, tokenizer)
    total = min(len(plan), training.max_steps or len(plan))
    expected = forecast(run.seconds, total, worst, sum(p.numel() for p in trained))
    if expected:
        b.report.log(f"forecast: {expected.words}")
        verdict.evidence |= {
            "forecast": markdown(expected.words),
            "forecast_seconds": number(round(expected.seconds, 1)),
            "memory_mb": number(round(expected.memory_mb, 1)),
        }
        write_json(b.out / "forecast.json", {**asdict(expected), "worst_micro_batch": asdict(worst)})


def probed_copy(b: Build, config: SanityCheckConfig, verdict: Verdict) -> tuple[Any, str, "Shards", "Layout"]:
    """(a throw-away copy of the model, its precision, the training blocks, their layout on this device), and in the
    verdict whether the model keeps examples apart."""
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
    _probe(b, model, shards, layout, verdict)
    return model, loaded.precision, shards, layout


def _probe(b: Build, model: Any, shards: Any, layout: str, verdict: Verdict) -> None:
    """On the packed layout wherever blocks hold several examples, whatever this device uses, and on the layout in use."""
    from sft_pipeline.stages.sanity_check.probe import collate_as, probe, probe_block

    packing = any(len(shards.block(i).lengths) > 1 for i in range(min(len(shards), 64)))
    block = probe_block(shards)
    if block is None:
        verdict.say("boundaries", True, "There is only one example: nothing to be seen across a boundary.")
        return
    layouts = dict.fromkeys([*(["packed"] if packing else []), layout])
    probes = [probe(model, block, name, collate_as(name)) for name in layouts]  # type: ignore[arg-type]
    verdict.record["boundaries"] = [p.as_dict() for p in probes]
    bad = next((p for p in probes if not p.passed), None)
    matrix = [row for p in probes for row in p.rows()]
    if bad:
        words = f"Examples of a block see each other (layout {bad.layout}): {bad.cause}. Remedy: {bad.remedy}"
    else:
        most = max(
            (
                p.moved[i][j]
                for p in probes
                for i in range(len(p.moved))
                for j in range(len(p.moved))
                if i != j
            ),
            default=0.0,
        )
        words = f"No example sees another ({', '.join(layouts)}): changing one moves others by at most {most:.1e} nats, and packed loss equals unpacked loss."
    verdict.say("boundaries", bad is None, words, **({"differences": table(matrix)} if matrix else {}))
    b.report.log(words, "error" if bad else "info")


def _judge_run(b: Build, config: SanityCheckConfig, verdict: Verdict, run: Any) -> None:
    from sft_pipeline.training.schedule import Schedule

    rate = Schedule.of(config.training, config.model).peak
    problems = run.problems()
    if problems:
        words = f"At a learning rate of {rate:g} the short run is unstable: {'; '.join(problems)}. Lower training.learning_rate"
    else:
        ends = f", validation {run.val_loss[0][1]:.3f} to {run.val_loss[-1][1]:.3f}" if run.val_loss else ""
        words = f"{len(run.loss)} updates at up to {rate:g}: loss {run.loss[0][1]:.3f} to {run.loss[-1][1]:.3f}{ends}."
    plots.plot_loss(
        b.out / "plots" / "short_run.png", run.loss, run.val_loss, "Short run: loss per supervised token"
    )
    verdict.say("short_run_stable", not problems, words, curves=plot("plots/short_run.png"))
    verdict.record["short_run"] = {
        "loss": run.loss,
        "val_loss": run.val_loss,
        "grad_norm": run.grad_norm,
        "problems": problems,
        "learning_rate": rate,
        "stride": run.stride,
    }
    b.report.log(words, "error" if problems else "info")


def _samples(b: Build, config: SanityCheckConfig, verdict: Verdict, model: Any, tokenizer: Any) -> None:
    from sft_pipeline.training.generate import make_sampler

    tokenized = b.inputs["tokenized_rows"]
    parts = tokenized.parts("validation") or tokenized.parts("train")
    if not config.sanity.samples:
        verdict.say("samples", True, "None asked for (sanity.samples is 0).")
        return
    said = make_sampler(
        model, tokenizer, parts, _formatting(tokenized), config.sanity.samples, new_tokens=64
    )()
    b.report.samples(said, config.sanity.short_run_steps)
    shown = [{k: str(v)[:400] for k, v in row.items()} for row in said]
    spoken = [row for row in said if str(row["reply"]).strip()]
    words = f"{len(spoken)} of {len(said)} replies say something, {sum(bool(r['finished']) for r in said)} end by themselves."
    verdict.say("samples", bool(spoken) or not said, words, **({"replies": table(shown)} if shown else {}))
    verdict.record["samples"] = said


def _finish(b: Build, verdict: Verdict, data: DataFindings, specs: Sequence[CheckSpec]) -> Built:
    checks = tuple(verdict.checks[spec.name] for spec in specs)
    blocking = {spec.name for spec in specs if spec.blocking}
    verdict.record["checks"] = {c.name: {"passed": c.passed, "words": c.description} for c in checks}
    verdict.record["passed"] = all(c.passed for c in checks if c.name in blocking)
    write_json(b.out / "sanity.json", _plain(verdict.record))
    evidence = dict(verdict.evidence)
    for name in ("overfit", "short_run"):
        with contextlib.suppress(OSError):
            if (b.out / "plots" / f"{name}.png").stat().st_size:
                evidence[f"{name}_curve"] = plot(f"plots/{name}.png")
    return Built(
        counts={
            "tokens": data.tokens,
            "supervised_tokens": data.supervised,
            "checks_failed": sum(not c.passed for c in checks),
        },
        checks=checks,
        volatile=("plots/", "forecast.json"),
        evidence=evidence,
    )


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: written as text."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    return value
