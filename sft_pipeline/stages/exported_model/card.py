"""README.md of an export: the model card. No clock and no machine in it, so that it is the same when built again."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sft_pipeline.store import Manifest
from sft_pipeline.training.config import ModelConfig

SAMPLES = 4


@dataclass(frozen=True)
class CardFacts:
    """What the card tells.

    Attributes:
        evaluation: evaluation.json.
        samples: Rows of samples.parquet: test side, tuned and base of the same rows.
        manifests: The chain by stage name.
        training: What ran, where the recipe left it open (precision, learning rate, updates, ...).
        template: The chat template's Jinja source.
        dtype: Of the merged weights, None where there are none.
        base: The base's public name.
    """

    recipe: str
    dataset: str
    snapshot: str
    model: ModelConfig
    base: str
    license: str | None
    step: int
    evaluation: Mapping[str, Any]
    samples: Sequence[Mapping[str, Any]]
    manifests: Mapping[str, Manifest]
    training: Mapping[str, Any]
    template: str
    dtype: str | None
    adapter: bool
    base_is_local: bool


def card(facts: CardFacts) -> str:
    """The card's text: YAML front matter as the Hugging Face hub reads it, then what a person wants to know."""
    sections = [
        _what(facts),
        _results(facts),
        _samples(facts),
        _use(facts),
        _data(facts),
        _training(facts),
        _template(facts),
        _lineage(facts),
        _licence(facts),
    ]
    return f"---\n{_front_matter(facts)}\n---\n\n# {facts.recipe}\n\n" + "\n\n".join(sections) + "\n"


def _front_matter(facts: CardFacts) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=facts.dataset,
            dataset_name=f"{facts.dataset}, held-out groups",
            dataset_split="test",
            metric_type=name,
            metric_name=name,
            metric_value=value,
        )
        for name, value in facts.evaluation["tuned"].items()
        if value is not None
    ]
    data = ModelCardData(
        license=facts.license,
        library_name="transformers" if facts.dtype else "peft",
        pipeline_tag="text-generation",
        base_model=None if facts.base_is_local else facts.base,
        tags=["sft", facts.model.parameterization, f"dataset:{facts.dataset}", f"snapshot:{facts.snapshot}"],
        model_name=facts.recipe,
        eval_results=results or None,
    )
    return data.to_yaml().strip()


def _what(facts: CardFacts) -> str:
    kind = {
        "full": "full fine-tuning",
        "lora": "low-rank adapters (LoRA)",
        "qlora": "low-rank adapters on a 4-bit base (QLoRA)",
    }[facts.model.parameterization]
    revision = f" at `{facts.model.revision}`" if facts.model.revision else ""
    parts = (["`merged/` (whole weights, " + facts.dtype + ")"] if facts.dtype else []) + (
        ["`adapter/` (PEFT)"] if facts.adapter else []
    )
    return (
        f"`{facts.base}`{revision}, tuned by supervised fine-tuning on the snapshot `{facts.snapshot}` of `{facts.dataset}` with {kind}; "
        f"the checkpoint of step {facts.step}. Here: {' and '.join(parts)}.\n\n"
        f"Why this checkpoint: {facts.evaluation['why']}."
    )


def _results(facts: CardFacts) -> str:
    rows = [
        "| measure | base | tuned | difference | 95 % interval | p |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    comparison: Mapping[str, Any] = facts.evaluation["comparison"]
    for name, c in comparison.items():
        d = c["difference"]
        label = f"{name} (lower is better)" if c["lower_is_better"] else name
        rows.append(
            f"| {label} | {_n(c['base']['value'])} | {_n(c['tuned']['value'])} | {_n(d['value'], '+')} | {_n(d['low'], '+')} to {_n(d['high'], '+')} | {_p(c['p_value'])} |"
        )
    test = facts.evaluation["sides"]["test"]
    return (
        "## Base against tuned\n\nOn held-out groups, looked at once, after the choice.\n\n"
        + "\n".join(rows)
        + f"\n\n{test['rows']} test rows in {test['groups']} groups, {test['generated']} of them generated ({_decoding(facts.evaluation)}). "
        "Intervals: bootstrap over groups; p: exact sign test over rows."
    )


def _decoding(evaluation: Mapping[str, Any]) -> str:
    d = evaluation["decoding"]
    how = "greedy" if d["temperature"] == 0 else f"temperature {d['temperature']:g}, top-p {d['top_p']:g}"
    return f"{how}, at most {evaluation['max_new_tokens']} new tokens"


def _samples(facts: CardFacts) -> str:
    if not facts.samples:
        return "## Samples\n\nNothing was generated: the recipe has no graders."
    parts = []
    for s in facts.samples[:SAMPLES]:
        parts.append(
            f"Prompt:\n{_block(s['prompt'])}\n\nExpected:\n{_block(s['expected'])}\n\nTuned:\n{_block(s['reply'])}\n\nBase:\n{_block(s['base_reply'])}"
        )
    return "## Samples\n\nThe first of the test side, not chosen by hand.\n\n" + "\n\n---\n\n".join(parts)


def _block(text: str | None) -> str:
    text = (text or "").strip("\n")
    text = (
        "(empty)" if not text.strip() else text if len(text) <= 1200 else text[:600] + "\n…\n" + text[-600:]
    )
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"


def _use(facts: CardFacts) -> str:
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
        '    [{"role": "user", "content": "..."}], add_generation_prompt=True, return_tensors="pt", return_dict=True',
        ")",
        f"reply = model.generate(**prompt, max_new_tokens={facts.evaluation['max_new_tokens']})",
        'print(tokenizer.decode(reply[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
    return "## Use\n\nFrom this folder:\n\n```python\n" + "\n".join(code) + "\n```"


def _data(facts: CardFacts) -> str:
    rows = []
    raw, split, tokenized = (facts.manifests.get(n) for n in ("raw_rows", "grouped_split", "tokenized_rows"))
    for manifest in (
        raw,
        facts.manifests.get("validated_rows"),
        split,
        tokenized,
        facts.manifests.get("packed_shards"),
    ):
        if manifest:
            counts = ", ".join(f"{k} {v:,}" for k, v in manifest.counts.items())
            rows.append(
                f"| {manifest.asset.rpartition('/')[2]} | {counts} | `{manifest.data_version[:16]}` |"
            )
    sources = (
        [f"- `{_last(name)}` sha256 `{digest}`" for name, digest in sorted(raw.outside.items())]
        if raw
        else []
    )
    return (
        "## Data\n\n| stage | counts | data version |\n| --- | --- | --- |\n"
        + "\n".join(rows)
        + "\n\nSource files:\n\n"
        + "\n".join(sources)
    )


def _last(name: str) -> str:
    return name if not name.startswith(("/", "~")) else name.rpartition("/")[2]


def _training(facts: CardFacts) -> str:
    trained = facts.manifests.get("trained_checkpoints")
    values = dict(trained.config.get("training", {})) if trained else {}
    values |= {
        f"model.{k}": v
        for k, v in facts.model.model_dump(mode="json").items()
        if k in ("parameterization", "lora", "freeze") and v
    }
    if facts.model.parameterization == "full":
        values.pop("model.lora", None)
    values |= {f"as run: {k}": v for k, v in facts.training.items()}
    lines = [f"| {k} | {json.dumps(v, ensure_ascii=False)} |" for k, v in values.items() if v is not None]
    return "## Training\n\n| value | |\n| --- | --- |\n" + "\n".join(lines)


def _template(facts: CardFacts) -> str:
    return (
        "## Chat template\n\nThe one that training rendered with; `apply_chat_template` uses it.\n\n"
        + _block(facts.template).replace("text\n", "jinja\n", 1)
    )


def _lineage(facts: CardFacts) -> str:
    rows = [f"| {m.asset} | `{m.data_version}` | `{m.fingerprint}` |" for m in facts.manifests.values()]
    return (
        "## Lineage\n\n`lineage/` holds the manifest of every artifact behind this model, with the hash of every file; `sft lineage . --verify` checks them.\n\n"
        "| artifact | data version | fingerprint |\n| --- | --- | --- |\n" + "\n".join(rows)
    )


def _licence(facts: CardFacts) -> str:
    return (
        f"## Licence\n\n{facts.license}"
        if facts.license
        else "## Licence\n\nNot stated in the recipe (`export.license`). The base model's and the data's terms apply."
    )


def _n(value: float | None, sign: str = "") -> str:
    return "–" if value is None else f"{value:{sign}.3f}"


def _p(value: float | None) -> str:
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"
