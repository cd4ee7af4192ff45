"""Builds exported_model: merge, write, load again, prove, describe."""

import json
from pathlib import Path
from typing import Any

import torch

from sft_pipeline.errors import InputError
from sft_pipeline.external_files import ADAPTER_CONFIG
from sft_pipeline.reporting import Reporter
from sft_pipeline.stages.exported_model.card import CardFacts, model_card, paired_samples, values_as_run
from sft_pipeline.stages.exported_model.config import ExportedModelConfig
from sft_pipeline.stages.exported_model.lineage import (
    no_machine_paths,
    safetensors_only,
    upstream,
    write_lineage,
)
from sft_pipeline.stages.exported_model.merge import (
    load_exact,
    merge_adapter,
    target_dtype,
    unquantized,
    write_adapter,
    write_merged,
)
from sft_pipeline.stages.exported_model.verify import (
    ANSWER_TOKENS,
    ANSWERS,
    PROBES,
    ExportProof,
    difference,
    free_memory,
    greedy,
    logits,
    merged_equals_adapter,
    probe_rows,
    reload_answers_equal,
    reload_model,
    reload_tokenizer,
    served_prompt_equal,
)
from sft_pipeline.stages.stage import Build, Built, markdown, number, table
from sft_pipeline.tables.held_out import HeldOutRow
from sft_pipeline.text.exported_tokenizer import write_tokenizer
from sft_pipeline.text.reply import ReplyDecoder, formatting_of, tokenizer_of
from sft_pipeline.text.template import load_template
from sft_pipeline.training.model import load_base, load_for_inference, training_device

STEPS = 6


def build(b: Build) -> Built:
    """Writes adapter/, merged/, lineage/ and README.md, and proves them by loading them again.

    Raises:
        InputError: The chosen checkpoint is not there, or there is no row to prove the export with.
    """
    config: ExportedModelConfig = b.config
    tokenized, trained, evaluated = (
        b.inputs[n] for n in ("tokenized_rows", "trained_checkpoints", "evaluation")
    )
    evaluation = json.loads(evaluated.file("evaluation.json").read_text(encoding="utf-8"))
    step = evaluation["chosen_step"]
    checkpoint = trained.file(f"checkpoint-{step}")
    if not checkpoint.is_dir():
        raise InputError(
            f"{evaluated.manifest.asset} chose step {step}, which {trained.manifest.asset} has no checkpoint "
            "of; materialize evaluation again"
        )
    formatting, tokenizer = formatting_of(tokenized), tokenizer_of(tokenized)
    decoder = ReplyDecoder.of(tokenized)
    progress = _ExportProgress(b.report)
    has_adapter = (checkpoint / ADAPTER_CONFIG).is_file()
    merged = config.export.merge or not has_adapter
    folder = b.out / ("merged" if merged else "adapter")
    if has_adapter:
        write_adapter(checkpoint, b.out / "adapter", config.model)
    write_tokenizer(
        tokenizer,
        formatting["chat_template"],
        folder,
        pad_id=decoder.pad_id,
        with_tools=formatting["chat_template_with_tools"],
    )
    progress("tokenizer written")
    rows = probe_rows(tokenized, PROBES)
    proof = _write_and_prove(config, checkpoint, folder, rows, evaluation, decoder, progress, merged=merged)
    made_with = tokenized.manifest.config["template"]
    template = load_template(made_with["chat_template"], tokenizer, made_with["variables"])
    prompts_equal = served_prompt_equal(
        tokenized, b.inputs["grouped_split"], reload_tokenizer(folder), tokenizer, template
    )
    progress("served prompts compared")
    manifests = upstream(list(b.inputs.values()))
    write_lineage(manifests, b.out / "lineage")
    facts = CardFacts(
        config=config,
        snapshot=b.snapshot,
        evaluation=evaluation,
        samples=paired_samples(evaluated, step),
        # Of two manifests of one stage (one of them behind an older artifact) the one read last.
        manifests={m.asset.rpartition("/")[2]: m for m in manifests.values()},
        training=values_as_run(trained),
        template=formatting["chat_template"],
        dtype=str(proof.dtype).removeprefix("torch.") if merged else None,
        adapter=has_adapter,
    )
    card = model_card(facts)
    (b.out / "README.md").write_text(card, encoding="utf-8")
    progress("model card written")
    b.report.progress("exporting", STEPS, STEPS, "steps")
    files: list[dict[str, Any]] = [
        {"file": p.relative_to(b.out).as_posix(), "bytes": p.stat().st_size}
        for p in sorted(b.out.rglob("*"))
        if p.is_file()
    ]
    size = sum(f["bytes"] for f in files)
    return Built(
        counts={"step": step, "files": len(files), "bytes": size},
        checks=(
            merged_equals_adapter(proof),
            reload_answers_equal(proof, rows[:ANSWERS], decoder.decode, evaluated, evaluation),
            prompts_equal,
            safetensors_only(b.out),
            no_machine_paths(b.out),
        ),
        volatile=("lineage/",),
        evidence={
            "step": number(step),
            "files": table(files),
            "megabytes": number(round(size / 1e6, 3)),
            "model_card": markdown(card.partition("---\n\n")[2]),
        },
    )


class _ExportProgress:
    """Progress by steps, with their names in the log."""

    def __init__(self, report: Reporter) -> None:
        self.report, self.done = report, 0

    def __call__(self, step: str) -> None:
        self.done += 1
        self.report.log(f"export: {step}")
        self.report.progress("exporting", self.done, STEPS, "steps")


def _write_and_prove(
    config: ExportedModelConfig,
    checkpoint: Path,
    folder: Path,
    rows: list[HeldOutRow],
    evaluation: dict[str, Any],
    decoder: ReplyDecoder,
    progress: _ExportProgress,
    *,
    merged: bool,
) -> ExportProof:
    """Writes merged weights where they are wanted, and loads the export again, one model in memory at a time.

    Without merged weights the exported adapter on the base is compared with the checkpoint on the base, in
    fp32.
    """
    sequences, prompts = [r.prompt + r.target for r in rows], [r.prompt for r in rows[:ANSWERS]]
    new_tokens = min(ANSWER_TOKENS, evaluation["max_new_tokens"])
    stop_ids = sorted(decoder.stop_ids)
    stops: dict[str, Any] = {"eos_token_id": stop_ids, "pad_token_id": decoder.pad_id}
    dtype = target_dtype(config.export.dtype, config.model) if merged else torch.float32
    model = load_exact(config.model, checkpoint)
    has_adapter = hasattr(model, "peft_config")
    reference, exact = logits(model, sequences), None
    progress("checkpoint loaded")
    if merged:
        model = merge_adapter(model)
        exact = difference(reference, logits(model, sequences)) if has_adapter else None
        model = model.to(dtype)
        decoding = evaluation["decoding"]
        write_merged(model, folder, config.model, stop_ids=stop_ids, pad_id=decoder.pad_id, decoding=decoding)
        progress("weights written")
    before = greedy(model, prompts, new_tokens, **stops)
    del model
    free_memory()
    if merged:
        model = reload_model(folder, trust_remote_code=config.model.trust_remote_code)
        stops = {}  # the exported generation config has to stop the answers by itself
    else:
        from peft import PeftModel

        base = load_base(unquantized(config.model), dtype=torch.float32, device=training_device())
        model = PeftModel.from_pretrained(base, str(folder)).eval()
        del base
    loaded = difference(reference, logits(model, sequences))
    after = greedy(model, prompts, new_tokens, **stops)
    del model
    free_memory()
    progress("export loaded again")
    quantized = None
    if config.model.parameterization == "qlora":  # against the 4-bit model that was trained and judged
        model = load_for_inference(config.model, checkpoint)
        quantized = difference(reference, logits(model, sequences))
        del model
        free_memory()
    return ExportProof(exact, loaded, quantized, before, after, dtype)
