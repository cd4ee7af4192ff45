"""README.md of an export: the model card. No clock and no machine in it: built again, it is the same."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from sft_pipeline.hub import parse_hub_id
from sft_pipeline.stages.exported_model.config import ExportedModelConfig
from sft_pipeline.store import Artifact, Manifest
from sft_pipeline.training.export import public_name

SAMPLES = 4
TUNING = {
    "full": "full fine-tuning",
    "lora": "low-rank adapters (LoRA)",
    "qlora": "low-rank adapters on a 4-bit base (QLoRA)",
}


@dataclass(frozen=True)
class CardFacts:
    """What the card says.

    Attributes:
        evaluation: evaluation.json.
        samples: Rows of samples.parquet: test split, tuned and base of the same rows.
        manifests: The chain by stage name.
        training: What ran, where the recipe left it open (precision, learning rate, updates, ...).
        template: The chat template's Jinja source.
        dtype: Of the merged weights, None where there are none.
        adapter: Whether there is one.
    """

    config: ExportedModelConfig
    snapshot: str
    evaluation: Mapping[str, Any]
    samples: Sequence[Mapping[str, Any]]
    manifests: Mapping[str, Manifest]
    training: Mapping[str, Any]
    template: str
    dtype: str | None
    adapter: bool

    @property
    def base(self) -> str:
        """The base's name outside this machine."""
        return public_name(self.config.model.base)


def paired_samples(evaluated: Artifact, step: int) -> list[dict[str, Any]]:
    """The first test samples of the tuned model, with the base's reply to the same row."""
    columns = ["model", "step", "row_id", "prompt", "reply", "expected"]
    found = pq.read_table(
        evaluated.file("samples.parquet"), columns=columns, filters=[("side", "=", "test")]
    ).to_pylist()
    base = {r["row_id"]: r["reply"] for r in found if r["step"] is None}
    tuned = [r for r in found if r["step"] == step][:SAMPLES]
    return [{**r, "base_reply": base.get(r["row_id"])} for r in tuned]


def values_as_run(trained: Artifact) -> dict[str, Any]:
    """What training filled in for values that the recipe leaves open, from training.json."""
    path = trained.file("training.json")
    data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    model, schedule, updates = (data.get(name) or {} for name in ("model", "schedule", "updates"))
    of_model = ("architecture", "precision", "attention", "trainable_parameters", "total_parameters")
    found = {name: model.get(name) for name in of_model}
    found |= {"peak learning rate": schedule.get("peak"), "updates": updates.get("done")}
    found |= {name: data.get(name) for name in ("examples", "supervised_tokens", "stopped")}
    return {k: v for k, v in found.items() if v is not None}


def model_card(facts: CardFacts) -> str:
    """The card's text: YAML front matter as the Hugging Face hub reads it, then sections for people."""
    sections = [
        _summary(facts),
        _results(facts),
        _samples(facts),
        _use(facts),
        _data(facts),
        _training(facts),
        "## Chat template\n\nThe one that training rendered with; `apply_chat_template` uses it.\n\n"
        + _fenced(facts.template, "jinja"),
        _lineage(facts),
        "## Licence\n\n"
        + (
            facts.config.export.license
            or "Not stated in the recipe (`export.license`). The base model's and the data's terms apply."
        ),
    ]
    return f"---\n{_front_matter(facts)}\n---\n\n# {facts.config.recipe}\n\n" + "\n\n".join(sections) + "\n"


def _front_matter(facts: CardFacts) -> str:
    """The card's YAML header, with the results in the form that the hub reads."""
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=facts.config.dataset,
            dataset_name=f"{facts.config.dataset}, held-out groups",
            dataset_split="test",
            metric_type=name,
            metric_name=name,
            metric_value=value,
        )
        for name, value in facts.evaluation["tuned"].items()
        if value is not None
    ]
    data = ModelCardData(
        license=facts.config.export.license,
        library_name="transformers" if facts.dtype else "peft",
        pipeline_tag="text-generation",
        base_model=facts.base if parse_hub_id(facts.config.model.base) else None,
        tags=[
            "sft",
            facts.config.model.parameterization,
            f"dataset:{facts.config.dataset}",
            f"snapshot:{facts.snapshot}",
        ],
        model_name=facts.config.recipe,
        eval_results=results or None,
    )
    return data.to_yaml().strip()


def _summary(facts: CardFacts) -> str:
    revision = f" at `{facts.config.model.revision}`" if facts.config.model.revision else ""
    folders = [f"`merged/` (whole weights, {facts.dtype})"] if facts.dtype else []
    folders += ["`adapter/` (PEFT)"] if facts.adapter else []
    return (
        f"`{facts.base}`{revision}, tuned by supervised fine-tuning on the snapshot `{facts.snapshot}` "
        f"of `{facts.config.dataset}` with {TUNING[facts.config.model.parameterization]}; "
        f"the checkpoint of step {facts.evaluation['chosen_step']}. Here: {' and '.join(folders)}.\n\n"
        f"Why this checkpoint: {facts.evaluation['why']}."
    )


def _results(facts: CardFacts) -> str:
    """The table of the comparison with the base on the test split."""
    rows = [
        "| measure | base | tuned | difference | 95 % interval | p |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, c in facts.evaluation["comparison"].items():
        difference, p = c["difference"], c["p_value"]
        label = f"{name} (lower is better)" if c["lower_is_better"] else name
        rows.append(
            f"| {label} | {_number(c['base']['value'])} | {_number(c['tuned']['value'])} "
            f"| {_number(difference['value'], '+')} "
            f"| {_number(difference['low'], '+')} to {_number(difference['high'], '+')} "
            f"| {'< 0.001' if p is not None and p < 0.001 else _number(p)} |"
        )
    test, decoding = facts.evaluation["sides"]["test"], facts.evaluation["decoding"]
    if decoding["temperature"] == 0:
        how = "greedy"
    else:
        how = f"temperature {decoding['temperature']:g}, top-p {decoding['top_p']:g}"
    return (
        "## Base against tuned\n\nOn held-out groups, evaluated once, after the choice.\n\n"
        + "\n".join(rows)
        + f"\n\n{test['rows']} test rows in {test['groups']} groups, {test['generated']} of them generated "
        f"({how}, at most {facts.evaluation['max_new_tokens']} new tokens). "
        "Intervals: bootstrap over groups; p: exact sign test over rows."
    )


def _number(value: float | None, sign: str = "") -> str:
    return "–" if value is None else f"{value:{sign}.3f}"


def _samples(facts: CardFacts) -> str:
    if not facts.samples:
        return "## Samples\n\nNothing was generated: the recipe has no graders."
    parts = [
        f"Prompt:\n{_fenced(s['prompt'])}\n\nExpected:\n{_fenced(s['expected'])}\n\n"
        f"Tuned:\n{_fenced(s['reply'])}\n\nBase:\n{_fenced(s['base_reply'])}"
        for s in facts.samples
    ]
    return "## Samples\n\nThe first of the test split, not chosen by hand.\n\n" + "\n\n---\n\n".join(parts)


def _fenced(text: str | None, language: str = "text") -> str:
    """A Markdown code block; the middle of a long text is left out."""
    text = (text or "").strip("\n")
    if not text.strip():
        text = "(empty)"
    elif len(text) > 1200:
        text = text[:600] + "\n…\n" + text[-600:]
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"


def _use(facts: CardFacts) -> str:
    """Code that loads the model and generates a reply."""
    code = ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    if facts.dtype:
        code += [
            "",
            'tokenizer = AutoTokenizer.from_pretrained("merged")',
            'model = AutoModelForCausalLM.from_pretrained("merged", dtype="auto")',
        ]
    else:
        code += [
            "from peft import PeftModel",
            "",
            'tokenizer = AutoTokenizer.from_pretrained("adapter")',
            f'base = AutoModelForCausalLM.from_pretrained("{facts.base}")',
            'model = PeftModel.from_pretrained(base, "adapter")',
        ]
    code += [
        "prompt = tokenizer.apply_chat_template(",
        '    [{"role": "user", "content": "..."}], add_generation_prompt=True, return_tensors="pt", '
        "return_dict=True",
        ")",
        f"reply = model.generate(**prompt, max_new_tokens={facts.evaluation['max_new_tokens']})",
        'print(tokenizer.decode(reply[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
    return "## Use\n\nFrom this folder:\n\n```python\n" + "\n".join(code) + "\n```"


def _data(facts: CardFacts) -> str:
    """The stages that the rows passed, with their counts, and the source files."""
    rows, sources = [], []
    for stage in ("raw_rows", "validated_rows", "grouped_split", "tokenized_rows", "packed_shards"):
        if manifest := facts.manifests.get(stage):
            counts = ", ".join(f"{k} {v:,}" for k, v in manifest.counts.items())
            rows.append(f"| {stage} | {counts} | `{manifest.data_version[:16]}` |")
    if raw := facts.manifests.get("raw_rows"):
        for name, digest in sorted(raw.outside.items()):
            # Of a path of this machine only the file's name may be published.
            shown = name.rpartition("/")[2] if name.startswith(("/", "~")) else name
            sources.append(f"- `{shown}` sha256 `{digest}`")
    return (
        "## Data\n\n| stage | counts | data version |\n| --- | --- | --- |\n"
        + "\n".join(rows)
        + "\n\nSource files:\n\n"
        + "\n".join(sources)
    )


def _training(facts: CardFacts) -> str:
    trained = facts.manifests.get("trained_checkpoints")
    values = dict(trained.config.get("training", {})) if trained else {}
    model = facts.config.model.model_dump(mode="json")
    if facts.config.model.parameterization == "full":
        model.pop("lora")
    values |= {f"model.{k}": model[k] for k in ("parameterization", "lora", "freeze") if model.get(k)}
    values |= {f"as run: {k}": v for k, v in facts.training.items()}
    lines = [f"| {k} | {json.dumps(v, ensure_ascii=False)} |" for k, v in values.items() if v is not None]
    return "## Training\n\n| value | |\n| --- | --- |\n" + "\n".join(lines)


def _lineage(facts: CardFacts) -> str:
    rows = [f"| {m.asset} | `{m.data_version}` | `{m.fingerprint}` |" for m in facts.manifests.values()]
    return (
        "## Lineage\n\n`lineage/` holds the manifest of every artifact behind this model, "
        "with the hash of every file; `sft lineage . --verify` checks them.\n\n"
        "| artifact | data version | fingerprint |\n| --- | --- | --- |\n" + "\n".join(rows)
    )
