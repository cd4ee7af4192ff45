"""Builds exported_model: merge, write, load again, prove, describe."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from sft_pipeline.errors import InputError
from sft_pipeline.hub import parse_hub_id
from sft_pipeline.reporting import Reporter
from sft_pipeline.stages.exported_model import merge as merging
from sft_pipeline.stages.exported_model.card import CardFacts, card
from sft_pipeline.stages.exported_model.chain import by_stage, upstream, write_lineage
from sft_pipeline.stages.exported_model.config import ExportedModelConfig
from sft_pipeline.stages.exported_model.parity import (
    Difference,
    difference,
    greedy,
    logits,
    reload_model,
    reload_tokenizer,
)
from sft_pipeline.stages.exported_model.portable import machine_paths, unsafe_files
from sft_pipeline.stages.exported_model.proof import (
    ANSWER_TOKENS,
    ANSWERS,
    PROBES,
    Answers,
    compare_prompts,
    free_memory,
    merged_check,
    probe_rows,
)
from sft_pipeline.stages.exported_model.tokenizer_files import write_tokenizer
from sft_pipeline.stages.stage import Build, Built, Check, markdown, number, table
from sft_pipeline.store import Artifact
from sft_pipeline.tables.held_out import HeldOut
from sft_pipeline.text.reply import formatting_of, speech_of, tokenizer_of
from sft_pipeline.text.template import load_template
from sft_pipeline.training.config import ModelConfig
from sft_pipeline.training.model import load_base, load_for_inference, training_device

STEPS = 6


@dataclass(frozen=True)
class _Proof:
    """What was measured while the weights were written and loaded again."""

    exact: Difference | None
    loaded: Difference
    quantized: Difference | None
    answers: Answers
    judged: tuple[int, int] | None
    dtype: torch.dtype


def build(b: Build) -> Built:
    config: ExportedModelConfig = b.config
    tokenized, trained, evaluated = (
        b.inputs[n] for n in ("tokenized_rows", "trained_checkpoints", "evaluation")
    )
    evaluation = json.loads(evaluated.file("evaluation.json").read_text(encoding="utf-8"))
    step = evaluation["chosen_step"]
    checkpoint = trained.file(f"checkpoint-{step}")
    if not checkpoint.is_dir():
        raise InputError(
            f"{evaluated.manifest.asset} chose step {step}, which {trained.manifest.asset} has no checkpoint of; materialize evaluation again"
        )
    formatting, tokenizer, speech = formatting_of(tokenized), tokenizer_of(tokenized), speech_of(tokenized)
    tick = _Steps(b.report)
    adapter = merging.has_adapter(checkpoint)
    merged = config.export.merge or not adapter
    folder = b.out / ("merged" if merged else "adapter")
    if adapter:
        merging.write_adapter(checkpoint, b.out / "adapter", config.model)
    write_tokenizer(
        tokenizer,
        formatting["chat_template"],
        folder,
        pad_id=speech.pad_id,
        with_tools=formatting["chat_template_with_tools"],
    )
    tick("weights")
    rows = probe_rows(tokenized, PROBES)
    if not rows:
        raise InputError(f"{tokenized.manifest.asset} has no rows to prove the export with")
    settings = {"stop_ids": sorted(speech.stop_ids), "pad_id": speech.pad_id}
    if merged:
        proof = _write_and_prove(
            config, checkpoint, folder, rows, evaluation, evaluated, speech.decode, settings, tick
        )
    else:
        proof = _prove_adapter(
            config.model, checkpoint, folder, rows, evaluation, evaluated, speech.decode, settings, tick
        )
    served = reload_tokenizer(folder)
    template = load_template(tokenized.manifest.config["template"]["chat_template"], tokenizer)
    prompts = compare_prompts(
        tokenized, b.inputs["grouped_split"], served, tokenizer, template, tokenized.manifest.config
    )
    tick("served prompts compared")
    manifests = upstream(list(b.inputs.values()))
    write_lineage(manifests, b.out / "lineage")
    dtype = str(proof.dtype).removeprefix("torch.") if merged else None
    facts = CardFacts(
        recipe=config.recipe,
        dataset=config.dataset,
        snapshot=b.snapshot,
        model=config.model,
        base=merging.public_name(config.model.base),
        license=config.export.license,
        step=step,
        evaluation=evaluation,
        samples=_paired_samples(evaluated, step),
        manifests=by_stage(manifests),
        training=_as_run(trained),
        template=formatting["chat_template"],
        dtype=dtype,
        adapter=adapter,
        base_is_local=parse_hub_id(config.model.base) is None,
    )
    (b.out / "README.md").write_text(card(facts), encoding="utf-8")
    tick("model card written")
    b.report.progress("exporting", STEPS, STEPS, "steps")
    sizes = _sizes(b.out)
    return Built(
        counts={"step": step, "files": len(sizes), "bytes": sum(s["bytes"] for s in sizes)},
        checks=(
            merged_check(proof.exact, proof.loaded, proof.dtype, proof.quantized, merged=merged),
            proof.answers.check(proof.judged),
            prompts.check(),
            _safetensors_only(b.out),
            _no_machine_paths(b.out),
        ),
        volatile=("lineage/",),
        evidence={
            "step": number(step),
            "files": table(sizes),
            "megabytes": number(round(sum(s["bytes"] for s in sizes) / 1e6, 3)),
            "model_card": markdown((b.out / "README.md").read_text(encoding="utf-8").partition("---\n\n")[2]),
        },
    )


class _Steps:
    """Progress by steps, with their names in the log."""

    def __init__(self, report: Reporter) -> None:
        self.report, self.done = report, 0

    def __call__(self, what: str) -> None:
        self.done += 1
        self.report.log(f"export: {what}")
        self.report.progress("exporting", min(self.done, STEPS - 1), STEPS, "steps")


def _write_and_prove(
    config: ExportedModelConfig,
    checkpoint: Path,
    folder: Path,
    rows: list[HeldOut],
    evaluation: dict[str, Any],
    evaluated: Artifact,
    decode: Any,
    settings: dict[str, Any],
    tick: _Steps,
) -> _Proof:
    """One model in memory at a time: base and adapter, then merged, then loaded again."""
    sequences, prompts = [r.prompt + r.target for r in rows], [r.prompt for r in rows[:ANSWERS]]
    dtype = merging.target_dtype(config.export.dtype, config.model)
    new_tokens = min(ANSWER_TOKENS, evaluation["max_new_tokens"])
    stops = {"eos_token_id": settings["stop_ids"], "pad_token_id": settings["pad_id"]}
    model = merging.load_exact(config.model, checkpoint)
    apart = merging.has_adapter(checkpoint)
    reference = logits(model, sequences)
    model = merging.merge(model)
    exact = difference(reference, logits(model, sequences)) if apart else None
    tick("adapter merged" if apart else "weights loaded")
    model = model.to(dtype)
    merging.write_merged(model, folder, decoding=evaluation["decoding"], **settings)
    merging.copy_code(config.model, folder)
    before = greedy(model, prompts, new_tokens, **stops)
    del model
    free_memory()
    tick("weights written")
    model = reload_model(folder, trust_remote_code=config.model.trust_remote_code)
    loaded = difference(reference, logits(model, sequences))
    after = greedy(model, prompts, new_tokens)
    del model
    free_memory()
    tick("export loaded again")
    quantized = _against_quantized(config.model, checkpoint, sequences, reference)
    return _Proof(
        exact,
        loaded,
        quantized,
        _answers(prompts, before, after, decode),
        _as_judged(evaluated, evaluation, rows, before, settings, decode, new_tokens),
        dtype,
    )


def _prove_adapter(
    config: ModelConfig,
    checkpoint: Path,
    folder: Path,
    rows: list[HeldOut],
    evaluation: dict[str, Any],
    evaluated: Artifact,
    decode: Any,
    settings: dict[str, Any],
    tick: _Steps,
) -> _Proof:
    """Without merged weights: the exported adapter on the base against the checkpoint on the base."""
    from peft import PeftModel

    sequences, prompts = [r.prompt + r.target for r in rows], [r.prompt for r in rows[:ANSWERS]]
    new_tokens = min(ANSWER_TOKENS, evaluation["max_new_tokens"])
    stops = {"eos_token_id": settings["stop_ids"], "pad_token_id": settings["pad_id"]}
    model = merging.load_exact(config, checkpoint)
    reference, before = logits(model, sequences), greedy(model, prompts, new_tokens, **stops)
    del model
    free_memory()
    tick("checkpoint loaded")
    base = load_base(merging.unquantized(config), dtype=torch.float32, device=training_device())
    model = PeftModel.from_pretrained(base, str(folder)).eval()
    loaded, after = (
        difference(reference, logits(model, sequences)),
        greedy(model, prompts, new_tokens, **stops),
    )
    del model, base
    free_memory()
    tick("export loaded again")
    quantized = _against_quantized(config, checkpoint, sequences, reference)
    return _Proof(
        None,
        loaded,
        quantized,
        _answers(prompts, before, after, decode),
        _as_judged(evaluated, evaluation, rows, before, settings, decode, new_tokens),
        torch.float32,
    )


def _against_quantized(
    config: ModelConfig, checkpoint: Path, sequences: list[list[int]], reference: list[torch.Tensor]
) -> Difference | None:
    if config.parameterization != "qlora":
        return None
    model = load_for_inference(config, checkpoint)
    found = difference(reference, logits(model, sequences))
    del model
    free_memory()
    return found


def _answers(
    prompts: list[list[int]], before: list[list[int]], after: list[list[int]], decode: Any
) -> Answers:
    return Answers(
        [decode(p) for p in prompts],
        [decode(a) for a in before],
        [decode(a) for a in after],
        [a == b for a, b in zip(before, after, strict=True)],
    )


def _as_judged(
    evaluated: Artifact,
    evaluation: dict[str, Any],
    rows: list[HeldOut],
    answers: list[list[int]],
    settings: dict[str, Any],
    decode: Any,
    new_tokens: int,
) -> tuple[int, int] | None:
    """(answers that begin as the evaluation's replies, answers that it has a reply to); None where it generated none, or sampled."""
    if evaluation["decoding"]["temperature"] > 0:
        return None
    samples = pq.read_table(
        evaluated.file("samples.parquet"),
        columns=["row_id", "reply", "step"],
        filters=[("step", "=", evaluation["chosen_step"])],
    )
    replies = {r["row_id"]: r["reply"] for r in samples.to_pylist()}
    known = [
        (decode(a).strip(), replies[r.row_id].strip()) for r, a in zip(rows, answers) if r.row_id in replies
    ]
    # Answers are cut at fewer tokens here, and what the template puts around a reply is taken off there.
    same = sum(a == b or (b != "" and b in a) or (len(a) > 0 and b.startswith(a)) for a, b in known)
    return (same, len(known)) if known else None


def _paired_samples(evaluated: Artifact, step: int, count: int = 4) -> list[dict[str, Any]]:
    """The first test samples of the tuned model, with the base's reply to the same row."""
    columns = ["model", "step", "row_id", "prompt", "reply", "expected"]
    found = pq.read_table(
        evaluated.file("samples.parquet"), columns=columns, filters=[("side", "=", "test")]
    ).to_pylist()
    base = {r["row_id"]: r["reply"] for r in found if r["step"] is None}
    tuned = [r for r in found if r["step"] == step][:count]
    return [{**r, "base_reply": base.get(r["row_id"])} for r in tuned]


def _as_run(trained: Artifact) -> dict[str, Any]:
    """What training filled in for values that the recipe leaves open."""
    path = trained.file("training.json")
    data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    parts = {name: data.get(name) or {} for name in ("model", "schedule", "updates")}
    found = {
        name: parts["model"].get(name)
        for name in ("architecture", "precision", "attention", "trainable_parameters", "total_parameters")
    }
    found |= {"peak learning rate": parts["schedule"].get("peak"), "updates": parts["updates"].get("done")}
    found |= {name: data.get(name) for name in ("examples", "supervised_tokens", "stopped")}
    return {k: v for k, v in found.items() if v is not None}


def _sizes(folder: Path) -> list[dict[str, Any]]:
    return [
        {"file": p.relative_to(folder).as_posix(), "bytes": p.stat().st_size}
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    ]


def _safetensors_only(folder: Path) -> Check:
    found = unsafe_files(folder)
    weights = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.safetensors"))
    said = (
        f"weights are in {', '.join(weights)}"
        if not found
        else f"in a format that can run code or hide weights: {', '.join(found)}"
    )
    return Check("safetensors_only", not found and bool(weights), said)


def _no_machine_paths(folder: Path) -> Check:
    found = list(machine_paths(folder))
    if not found:
        return Check("no_machine_paths", True, "no exported file names a folder of this machine")
    first = found[0]
    return Check(
        "no_machine_paths",
        False,
        f"{len(found)} places name a folder of this machine, first {first['file']} line {first['line']}: {first['text']}",
        {"places": table(found[:20])},
    )
