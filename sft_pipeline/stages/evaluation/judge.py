"""Judges checkpoints: the loss of every held-out row, and the graders' scores of generated replies."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sft_pipeline.errors import InputError
from sft_pipeline.external_files import ADAPTER_CONFIG
from sft_pipeline.graders.graders import Grader
from sft_pipeline.reporting import Reporter
from sft_pipeline.stages.evaluation.config import SAMPLE_COLUMNS, EvaluationConfig
from sft_pipeline.store import Artifact
from sft_pipeline.tables.held_out import HeldOutRow, chosen_positions, held_out_rows
from sft_pipeline.tables.parquet import FileWriter, count_rows, read_batches
from sft_pipeline.tables.schemas import IGNORE_LABEL
from sft_pipeline.text.reply import ReplyDecoder
from sft_pipeline.training.config import ModelConfig
from sft_pipeline.training.generate import Reply, generate, score_nll
from sft_pipeline.training.model import inference_dtype, load_for_inference, training_device
from sft_pipeline.training.process import threads_for

ROWS_AT_ONCE = 4096


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


class CheckpointModels:
    """Loads the models that are judged, one at a time.

    On a GPU adapters are exchanged on one base, which is loaded once. On a CPU, where each small operation
    costs, an adapter is merged into a base of its own: generation takes half the time, and in fp32 the logits
    are the same to 1e-5.

    Args:
        config: The recipe's model section.
        checkpoints: Folder of each step.
        precision: Of the training. What was trained in fp32 is judged in fp32, also where the GPU has bf16.
        as_trained: For QLoRA the 4-bit models that were trained, instead of those that are exported.
    """

    def __init__(
        self, config: ModelConfig, checkpoints: dict[int, Path], precision: str, *, as_trained: bool = False
    ) -> None:
        self.config, self.checkpoints, self.as_trained = config, checkpoints, as_trained
        self._dtype = inference_dtype(precision)
        self._model: Any = None
        self._adapter: str | None = None

    @property
    def _merges(self) -> bool:
        adapters = self.config.parameterization != "full"
        return adapters and not self.as_trained and training_device().type == "cpu"

    def tuned(self, step: int) -> Any:
        """The model of one checkpoint; any model that was given out before must not be used any more."""
        folder = self.checkpoints[step]
        if self._merges or not (folder / ADAPTER_CONFIG).is_file():
            self._model = None  # frees the memory of the model before, ahead of loading the next
            model = load_for_inference(self.config, folder, dtype=self._dtype)
            self._model = model.merge_and_unload() if hasattr(model, "peft_config") else model
            return self._model
        name = f"step_{step}"
        if self._adapter is None:
            self._model = load_for_inference(
                self.config, folder, dtype=self._dtype, as_trained=self.as_trained
            )
            self._adapter = next(iter(self._model.peft_config))
        elif self._adapter != name:
            self._model.load_adapter(str(folder), adapter_name=name, is_trainable=False)
            self._model.set_adapter(name, inference_mode=True)
            # Last, since PEFT chooses another one by itself when the active adapter is deleted.
            self._model.delete_adapter(self._adapter)
            self._adapter = name
        self._model.requires_grad_(False)
        return self._model.eval()

    @contextlib.contextmanager
    def base(self) -> Iterator[Any]:
        """The untuned model, for the time of the context."""
        if self._adapter is not None:
            with self._model.disable_adapter():
                yield self._model
            return
        self._model, self._adapter = None, None
        self._model = load_for_inference(self.config, None, dtype=self._dtype)
        yield self._model
        self._model = None


@dataclass(frozen=True)
class HeldOutSplit:
    """The validation or test split of tokenized_rows.

    Attributes:
        parts: Its Parquet parts.
        rows: Their rows.
        positions: The rows that are generated.
    """

    name: str
    parts: list[Path]
    rows: int
    positions: list[int]

    @classmethod
    def of(cls, tokenized: Artifact, name: str, config: EvaluationConfig) -> "HeldOutSplit":
        """A split by its name; without graders nothing is generated."""
        parts = tokenized.parts(name)
        positions = chosen_positions(parts, config.max_rows) if config.graders else []
        return cls(name, parts, count_rows(parts), positions)

    def groups(self) -> list[str]:
        """The group of every row."""
        return [g for batch in read_batches(self.parts, ["group"]) for g in batch.column(0).to_pylist()]


class SamplesWriter(FileWriter):
    """Writes samples.parquet: every generated reply with its scores, in the order in which they are judged.

    Columns: side (validation, test), model (base, checkpoint-<step>), step (int64, null for the base),
    row_id, group, prompt, reply, expected, finished (bool), and one float64 for each grader, by its name.
    """

    def __init__(self, path: Path, graders: Sequence[Grader]) -> None:
        types = {"step": pa.int64(), "finished": pa.bool_()}
        columns = [(name, types.get(name, pa.string())) for name in SAMPLE_COLUMNS]
        super().__init__(path, pa.schema([*columns, *((g.name, pa.float64()) for g in graders)]))


@dataclass(frozen=True)
class Judgement:
    """What one model did on one split.

    Attributes:
        nll: Summed negative log-likelihood (nats) of each row's supervised tokens, all rows of the split;
            where messages have loss weights, the weighted sum.
        tokens, weight: For each row the number of these tokens, and the sum of their weights.
        scores: For each grader, one score for each generated row.
        unfinished: Replies cut at `max_new_tokens`.
    """

    nll: np.ndarray
    tokens: np.ndarray
    weight: np.ndarray
    scores: dict[str, np.ndarray]
    unfinished: int

    def measures(self) -> dict[str, float]:
        """Each grader's mean over the generated rows, then `val_loss`, NLL per token; NaN without rows."""
        total = float(self.weight.sum())
        means = {name: float(s.sum()) / len(s) if len(s) else math.nan for name, s in self.scores.items()}
        return {**means, "val_loss": float(self.nll.sum()) / total if total else math.nan}


class _JoinedProgress(Reporter):
    """One progress bar over several pieces of work."""

    def __init__(self, report: Reporter, name: str, total: int) -> None:
        self.report, self.name, self.total, self.before = report, name, total, 0

    def progress(self, name: str, done: float, total: float | None, unit: str) -> None:
        self.report.progress(self.name, self.before + done, self.total, "rows")

    def finished(self, count: int) -> None:
        """Ends a piece of work of so many rows."""
        self.before += count
        self.report.progress(self.name, self.before, self.total, "rows")


@dataclass(frozen=True)
class Judge:
    """What is the same for every model and split that an evaluation judges."""

    config: EvaluationConfig
    graders: Sequence[Grader]
    decoder: ReplyDecoder
    samples: SamplesWriter
    report: Reporter

    def judge(self, model: Any, split: HeldOutSplit, step: int | None, name: str) -> Judgement:
        """Scores a model on a split, a few thousand rows at a time, and writes its replies to the samples.

        Args:
            step: Of the checkpoint, None for the base.
            name: Of the progress, for example "evaluating step 200".

        Raises:
            InputError: A Python grader raised, or returned something that is no score.
        """
        progress = _JoinedProgress(self.report, name, split.rows + len(split.positions))
        scores: dict[str, list[float]] = {g.name: [] for g in self.graders}
        unfinished = 0
        with threads_for(model):
            losses = _losses(model, split, progress)
            waiting = held_out_rows(split.parts, split.positions)
            while rows := list(islice(waiting, ROWS_AT_ONCE)):
                samples = []
                for row, generated in zip(rows, self._generate(model, rows, progress)):
                    reply, finished = self.decoder.reply(
                        generated.ids, generated.finished, target=row.target, completion=row.completion
                    )
                    expected = self.decoder.expected(row.target, row.completion)
                    known = {
                        "row_id": row.row_id,
                        "group": row.group,
                        "prompt": self.decoder.decode(row.prompt),
                    }
                    sample: dict[str, Any] = {
                        **known,
                        "side": split.name,
                        "model": "base" if step is None else f"checkpoint-{step}",
                        "step": step,
                        "reply": reply,
                        "expected": expected,
                        "finished": finished,
                    }
                    for grader in self.graders:
                        score = grader(reply, expected, known | {"completion": expected})
                        scores[grader.name].append(score)
                        sample[grader.name] = score
                    samples.append(sample)
                    unfinished += not finished
                self.samples.append(samples)
                progress.finished(len(rows))
        arrays = {name: np.asarray(s, dtype=np.float64) for name, s in scores.items()}
        return Judgement(*losses, arrays, unfinished)

    def _generate(self, model: Any, rows: Sequence[HeldOutRow], progress: Reporter) -> list[Reply]:
        """A reply to each row. Greedily, equal prompts have equal replies, and each is generated once."""
        prompts = [tuple(r.prompt) for r in rows]
        decoding = self.config.decoding
        if decoding.temperature > 0:
            distinct = prompts
            # `generate` seeds a reply by its index in the call: another seed for each call keeps replies
            # independent.
            decoding = decoding.model_copy(update={"seed": decoding.seed + rows[0].position})
        else:
            distinct = list(dict.fromkeys(prompts))
        replies = generate(
            model,
            [list(p) for p in distinct],
            max_new_tokens=self.config.max_new_tokens,
            stop_ids=set(self.decoder.stop_ids),
            pad_id=self.decoder.pad_id,
            batch_size=self.config.batch_size,
            decoding=decoding,
            report=progress,
        )
        if len(distinct) == len(prompts):
            return replies
        by_prompt = dict(zip(distinct, replies))
        return [by_prompt[p] for p in prompts]


def validation_loss(model: Any, split: HeldOutSplit, report: Reporter, name: str) -> float:
    """NLL per supervised token (weighted where messages have weights) of all rows of a split; NaN without."""
    with threads_for(model):
        nll, _, weight = _losses(model, split, _JoinedProgress(report, name, split.rows))
    return float(nll.sum() / weight.sum()) if weight.sum() else math.nan


def _losses(
    model: Any, split: HeldOutSplit, progress: _JoinedProgress
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(summed NLL in nats, supervised tokens, sum of their weights) of each row: float64, int64, float64."""
    results: list[tuple[float, float]] = []
    tokens: list[int] = []
    for batch in read_batches(split.parts, ["input_ids", "labels", "weights"], ROWS_AT_ONCE):
        columns = (batch.column(name) for name in ("input_ids", "labels", "weights"))
        examples: Any = [
            tuple(np.array(v.values) if v.is_valid else None for v in row) for row in zip(*columns)
        ]
        results += score_nll(model, examples, report=progress)
        tokens += [int(np.count_nonzero(labels[1:] != IGNORE_LABEL)) for _, labels, _ in examples]
        progress.finished(len(examples))
    nll, weight = zip(*results) if results else ((), ())
    floats = np.asarray(nll, dtype=np.float64), np.asarray(weight, dtype=np.float64)
    return floats[0], np.asarray(tokens, dtype=np.int64), floats[1]
