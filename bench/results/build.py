"""Builds branches with the code of one checkout, each in a fresh process, and keeps what came out."""

import csv
import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

DEMO = "access_policy_lora"
ROWS = 5_000
ENDED = ("exported", "materialized", "blocked")  # a build that a check stopped is a result like any other


@dataclass(frozen=True)
class Branch:
    """One recipe to build.

    Attributes:
        recipe: Its name, and that of the folder which the build is kept in.
        dataset: Names the generated dataset file and rows; None for the demo, which the project brings along.
        tokenizer: A folder below `tokenizers/` of the public data.
        supervise: The mask's mode.
        max_length: Tokens per block; longer rows are rejected.
        until: The last stage; None builds all.
        updates: Cuts the training after so many updates; None trains as the recipe says.
    """

    recipe: str
    dataset: str | None = None
    tokenizer: str = ""
    supervise: str = ""
    max_length: int = 0
    until: str | None = "packed_shards"
    updates: int | None = None

    @property
    def folder(self) -> str:
        cut = f"-{self.updates}-updates" if self.updates else ""
        return f"{self.recipe}-to-{self.until or 'exported_model'}{cut}"


def branches(datasets: tuple[str, ...], until: str | None, updates: int | None) -> list[Branch]:
    """The demo, and each dataset with one tokenizer per mode; over the datasets every pair of them occurs."""
    pairs = (("qwen3", "smollm2"), ("smollm2", "qwen3"))
    found = [Branch(DEMO, until=until, updates=updates)] if "demo" in datasets else []
    for number, name in enumerate(READERS):
        if name in datasets:
            for tokenizer, mode in zip(pairs[number % 2], ("completion", "assistant"), strict=True):
                most = MAX_LENGTH[name]
                recipe = f"same_{name}_{tokenizer}_{mode}_{most}"
                found.append(Branch(recipe, name, tokenizer, mode, most))
    return found


def build(branch: Branch, checkout: Path, config: Path, kept: Path) -> dict[str, Any]:
    """What `sft run --json` of a checkout's code prints for a branch; built unless `kept` has it already.

    Args:
        config: The folder that `write_config` filled.
        kept: The store goes to a folder in here.

    Raises:
        RuntimeError: It was another sft_pipeline that answered, or the build failed; with the end of its log.
    """
    home = kept / branch.folder
    answer = home / "sft_run.json"
    if answer.is_file():
        return json.loads(answer.read_text())
    shutil.rmtree(home, ignore_errors=True)  # a build that was interrupted
    home.mkdir(parents=True)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SFT_", "DAGSTER_", "MLFLOW_"))}
    environment |= {
        "PYTHONPATH": str(checkout),
        "SFT_PROJECT_ROOT": str(checkout),
        "SFT_CONFIG_PATH": str(config),
        "SFT_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
    }

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)

    # An editable install of another checkout must not answer for this one.
    found = run("-c", "import sft_pipeline; print(sft_pipeline.__file__)").stdout.strip()
    if not found or checkout.resolve() not in Path(found).resolve().parents:
        raise RuntimeError(f"with PYTHONPATH={checkout}, sft_pipeline is imported from {found or 'nowhere'}")
    until = ["--until", branch.until] if branch.until else []
    cut = ["--set", f"training.max_steps={branch.updates}"] if branch.updates else []
    done = run("-m", "sft_pipeline.cli", "run", branch.recipe, "--json", *until, *cut)
    result = json.loads(done.stdout) if done.stdout.strip().startswith("{") else {}
    if result.get("status") not in ENDED:
        raise RuntimeError(f"{branch.recipe} in {checkout}:\n{result.get('error')}\n{done.stderr[-4000:]}")
    answer.write_text(json.dumps(result))
    return result


def write_config(folder: Path, data: Path, wanted: list[Branch]) -> None:
    """Rows, dataset files and recipe files for the branches on public data; what is there already stays."""
    for name in ("rows", "datasets", "recipes"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name in {b.dataset for b in wanted if b.dataset}:
        rows = folder / "rows" / f"{name}.jsonl"
        if not rows.is_file():
            lines = (json.dumps(row, ensure_ascii=False) for row in islice(READERS[name](data), ROWS))
            rows.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        dataset = {
            "name": f"same_{name}",
            "sources": [{"path": str(rows), "static": True, **SHAPES[name]}],
            "contract": {"max_reject_rate": 0.9},
        }
        # JSON is YAML
        (folder / "datasets" / f"same_{name}.yaml").write_text(json.dumps(dataset, indent=1))
    for branch in wanted:
        if branch.dataset:
            recipe = {
                "name": branch.recipe,
                "dataset": f"same_{branch.dataset}",
                "model": {"base": str(data / "tokenizers" / branch.tokenizer)},
                "tokens": {"max_length": branch.max_length, "supervise": branch.supervise},
            }
            (folder / "recipes" / f"{branch.recipe}.yaml").write_text(json.dumps(recipe, indent=1))


def gsm8k(data: Path) -> Iterator[dict[str, Any]]:
    """Questions and worked answers, as published; each row is its own group."""
    with (data / "gsm8k" / "train.jsonl").open(encoding="utf-8") as stream:
        yield from map(json.loads, stream)


def banking77(data: Path) -> Iterator[dict[str, Any]]:
    """Every second query, so that all intents occur; many nearly repeat another."""
    with (data / "banking77" / "train.csv").open(encoding="utf-8", newline="") as stream:
        yield from islice(csv.DictReader(stream), 0, None, 2)


def multidogo(data: Path) -> Iterator[dict[str, Any]]:
    """Dialogues: what the customer says, and the annotated intent and slots as the assistant's turns."""
    for area in sorted((data / "multidogo").glob("*/train.tsv")):
        turns: dict[str, list[dict[str, str]]] = defaultdict(list)
        with area.open(encoding="utf-8", newline="") as stream:
            for line in csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE):
                turns[line["conversationId"]] += [
                    {"role": "user", "content": line["utterance"]},
                    {"role": "assistant", "content": f"{line['intent']}: {line['slot-labels']}"},
                ]
        for group, messages in turns.items():
            yield {"conversation": group, "messages": messages}


MAX_LENGTH = {"gsm8k": 256, "banking77": 256, "multidogo": 1024}  # some rows of gsm8k are longer
READERS = {"gsm8k": gsm8k, "banking77": banking77, "multidogo": multidogo}
SHAPES: dict[str, dict[str, Any]] = {
    "gsm8k": {"format": "prompt_completion", "columns": {"prompt": "question", "completion": "answer"}},
    "banking77": {"format": "prompt_completion", "columns": {"prompt": "text", "completion": "category"}},
    "multidogo": {"format": "messages", "columns": {"group": "conversation"}},
}
