"""Builds exported_model: merge, write, load again, prove, describe."""

import json
from typing import Any

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
from sft_pipeline.stages.exported_model.verify import (
    ANSWER_TOKENS,
    ANSWERS,
    PROBES,
    merged_equals_adapter,
    reload_answers_equal,
    reload_tokenizer,
    served_prompt_equal,
)
from sft_pipeline.stages.stage import Build, Built, markdown, number, table
from sft_pipeline.tables.held_out import probe_rows
from sft_pipeline.text.exported_tokenizer import write_tokenizer
from sft_pipeline.text.find_template import load_template
from sft_pipeline.text.reply import ReplyDecoder, formatting_of, tokenizer_of
from sft_pipeline.training.export import ExportSettings, write_adapter, write_and_compare

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
    settings = ExportSettings(
        config.model,
        merged,
        config.export.dtype,
        sorted(decoder.stop_ids),
        decoder.pad_id,
        evaluation["decoding"],
    )
    proof = write_and_compare(
        settings,
        checkpoint,
        folder,
        [r.prompt + r.target for r in rows],
        [r.prompt for r in rows[:ANSWERS]],
        min(ANSWER_TOKENS, evaluation["max_new_tokens"]),
        step=progress,
    )
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
