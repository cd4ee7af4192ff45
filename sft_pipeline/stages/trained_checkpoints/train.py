"""One training from packed shards to checkpoints, resumable at any moment. Every rank runs this."""

import os
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from sft_pipeline.errors import InputError
from sft_pipeline.learning.base import clear_loading_errors, tokenizer_folder
from sft_pipeline.learning.config import ModelConfig, TrainingConfig
from sft_pipeline.learning.feed import Feed, layout_for
from sft_pipeline.learning.generate import generate
from sft_pipeline.learning.model import LoadReport, load_for_training, save_weights, training_device
from sft_pipeline.learning.schedule import Schedule
from sft_pipeline.learning.shards import Plan, Shards
from sft_pipeline.learning.trainer import NotFinite, SupervisedTrainer
from sft_pipeline.reporting import Reporter
from sft_pipeline.stages.trained_checkpoints import state
from sft_pipeline.stages.trained_checkpoints.bundle import Bundle, latest_whole, retire, write_bundle
from sft_pipeline.stages.trained_checkpoints.watch import Curves, Watch

SAMPLES, SAMPLE_TOKENS = 3, 96


@dataclass(frozen=True)
class Data:
    """What is read, and the digests that a resumed run must find unchanged.

    Attributes:
        train, validation, heldout: Parquet parts of packed_shards/train, packed_shards/validation and
            tokenized_rows/validation.
        formatting: formatting.json as a dict.
        data_manifest, eval_manifest: Content digests.
    """

    train: list[Path]
    validation: list[Path]
    heldout: list[Path]
    plan: Path
    formatting: Mapping[str, Any]
    data_manifest: Mapping[str, Any]
    eval_manifest: Mapping[str, Any]

    def identity(self) -> dict[str, Any]:
        """The items of a bundle that must not change under a resume."""
        return {
            "tokenizer_version": self.formatting["tokenizer_sha256"], "chat_template_version": self.formatting["template_sha256"],
            "data_manifest": dict(self.data_manifest), "eval_manifest": dict(self.eval_manifest),
        }  # fmt: skip


@dataclass
class Outcome:
    """What a training was."""

    loaded: LoadReport
    layout: str
    loss_path: str
    schedule: Schedule
    planned: int
    done: int
    stopped: str
    failure: NotFinite | None
    watch: Watch
    feed: Feed
    resumed_at: int
    threads: int
    samples: list[dict[str, Any]] = field(default_factory=list)


def train(model_config: ModelConfig, training: TrainingConfig, data: Data, work: Path, report: Reporter) -> Outcome:
    """Trains from the newest whole checkpoint in `work`, or from the beginning.

    Raises:
        InputError: Unknown base; a checkpoint that belongs to other data; a full disk.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    be_deterministic(training.seed)
    device = training_device()
    bundle = latest_whole(work, report if rank == 0 else Reporter())
    if bundle is not None:
        refuse_foreign(bundle, data)
        report.log(f"resuming after update {bundle.step}")
    report.log(f"loading {model_config.base}")
    model, loaded = load_for_training(model_config, training, bundle.path if bundle else None, device=device)
    tokenizer = load_tokenizer(model_config)
    plan, shards = Plan(data.plan), Shards(data.train)
    total = min(len(plan), training.max_steps or len(plan))
    feed = make_feed(shards, plan, training, layout=layout_for(device, loaded.attention), updates=total, rank=rank, world=world)
    validation = Shards(data.validation) if data.validation else None
    report.log(f"{loaded.trainable_parameters:,} of {loaded.total_parameters:,} parameters are trained ({loaded.parameterization}, {loaded.precision}, {loaded.attention}, layout {feed.layout}); {total:,} updates")
    watch = Watch(
        total=total, report=report, curves=Curves.read(bundle.path / "curves.parquet") if bundle else None, early_stopping=training.early_stopping,
        sampler=make_sampler(model, tokenizer, data.heldout, data.formatting, SAMPLES) if rank == 0 and data.heldout else None,
        speed_log=work / "throughput.jsonl" if rank == 0 else None, resumed_at=bundle.step if bundle else 0,
    )  # fmt: skip
    schedule = Schedule.of(training, model_config)
    trainer = SupervisedTrainer(
        model, feed=feed, validation=validation if validation is not None and len(validation) else None, tokenizer=tokenizer, training=training,
        schedule=schedule, precision=loaded.precision, folder=work / "trainer", listener=watch,
        saver=_Saver(work, model_config, data, watch, training.keep_checkpoints), resume=(bundle.path, _Restore(bundle, rank, world, training.seed, report)) if bundle else None,
    )  # fmt: skip
    failure = None
    try:
        done = trainer.run()
    except NotFinite as error:
        failure, done = error, error.step - 1
        report.log(f"{error}; the update was not applied and the run ends here. The last good checkpoint is kept", "error")
    stopped = str(failure) if failure else watch.stop_reason() or ("max_steps reached" if total < len(plan) else "plan finished")
    samples = watch.samples or (list(watch.sampler()) if watch.sampler and not failure else [])
    return Outcome(loaded, feed.layout, trainer.loss_path, schedule, total, done, stopped, failure, watch, feed, bundle.step if bundle else 0, torch.get_num_threads(), samples)


def make_feed(shards: Shards, plan: Plan, training: TrainingConfig, *, layout: Any, updates: int, rank: int = 0, world: int = 1) -> Feed:
    """A rows micro-batch may hold as many padded tokens as a packed one would: per_device_batch of the longest block."""
    longest = max((len(shards.block(int(b)).input_ids) for b in plan.blocks(0)), default=1)
    return Feed(shards, plan, layout, training.per_device_batch, max_tokens=training.per_device_batch * longest, updates=updates, rank=rank, world=world)


def be_deterministic(seed: int) -> None:
    """Seeds every generator and asks for deterministic kernels, where there are any."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    random.seed(seed)
    np.random.seed(seed % (1 << 32))
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)


def load_tokenizer(config: ModelConfig) -> Any:
    """The recipe's tokenizer.

    Raises:
        InputError: It cannot be loaded.
    """
    from transformers import AutoTokenizer

    folder = tokenizer_folder(config)
    with clear_loading_errors(f"the tokenizer {config.tokenizer or config.base}"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code)


def refuse_foreign(bundle: Bundle, data: Data) -> None:
    """
    Raises:
        InputError: The checkpoint was made with other data, another template or another tokenizer.
    """
    for item, value in data.identity().items():
        if bundle.value(item) != value:
            raise InputError(f"{bundle.path} cannot be resumed: its {item} is not that of the inputs ({_short(bundle.value(item))} there, {_short(value)} here). Delete the folder to train anew")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 60 else text[:57] + "..."


def sample_rows(parts: list[Path], count: int) -> list[dict[str, Any]]:
    """`count` tokenized rows, spread over the first row group: always the same ones."""
    for part in parts:
        file = pq.ParquetFile(part, memory_map=True)
        if file.metadata.num_rows:
            table = file.read_row_group(0, columns=["input_ids", "prompt_length", "completion"])
            at = sorted({round(i * (table.num_rows - 1) / max(1, count - 1)) for i in range(min(count, table.num_rows))})
            return table.take(at).to_pylist()
    return []


def stop_ids(formatting: Mapping[str, Any]) -> set[int]:
    """Ids that end a turn, as the tokenized stage recorded them."""
    found: set[int] = set()
    for key in ("stop_token_ids", "stop_ids", "stop_token_id", "eos_token_id"):
        value = formatting.get(key)
        if isinstance(value, int):
            found.add(value)
        elif isinstance(value, list):
            found |= {int(v) for v in value}
    return found


def make_sampler(model: Any, tokenizer: Any, parts: list[Path], formatting: Mapping[str, Any], count: int, new_tokens: int = SAMPLE_TOKENS) -> Callable[[], list[dict[str, Any]]]:
    """Replies of the model as it is now to a few fixed held-out prompts."""
    rows = sample_rows(parts, count)
    prompts = [r["input_ids"][: r["prompt_length"]] for r in rows]
    ends = stop_ids(formatting)

    def sample() -> list[dict[str, Any]]:
        replies = generate(model, prompts, max_new_tokens=new_tokens, stop_ids=ends, pad_id=min(ends, default=0), batch_size=max(1, count))
        return [
            {"prompt": tokenizer.decode(p), "reply": tokenizer.decode(r.ids), "expected": row["completion"], "finished": r.finished}
            for p, r, row in zip(prompts, replies, rows, strict=True)
        ]

    return sample


class _Saver:
    """Writes the eleven items. All ranks take part in gathering; rank 0 writes."""

    def __init__(self, work: Path, model_config: ModelConfig, data: Data, watch: Watch, keep: int | None) -> None:
        self.work, self.model_config, self.data, self.watch, self.keep = work, model_config, data, watch, keep

    def __call__(self, trainer: SupervisedTrainer) -> None:
        states = state.all_rng_states()
        step = trainer.state.global_step
        if trainer.is_world_process_zero():
            best = self.watch.best
            values = {
                "global_step": step, "sampler_position": {"update": step, "of": trainer.feed.updates}, **self.data.identity(),
                "best_metric": {"name": "val_loss", "value": best[1], "step": best[0]} if best else {"name": "val_loss", "value": None, "step": None},
            }  # fmt: skip
            write_bundle(self.work, step, lambda folder: self._files(trainer, folder, states), values)
            retire(self.work, self.keep, best[0] if best else None)
        trainer.accelerator.wait_for_everyone()

    def _files(self, trainer: SupervisedTrainer, folder: Path, states: list[dict[str, Any]]) -> dict[str, list[str]]:
        save_weights(trainer.model, folder, self.model_config)
        files = {"model": [p.name for p in folder.iterdir()]}
        files["optimizer"] = state.save_optimizer(trainer.optimizer, trainer.model, folder, trainer.accelerator.scaler)
        files["scheduler"] = state.save_scheduler(trainer.lr_scheduler, folder)
        files["rng"] = state.save_rng(states, folder)
        self.watch.curves.write(folder / "curves.parquet")
        files["curves"] = ["curves.parquet"]
        files["trainer_state"] = state.save_trainer_state(trainer.state, folder)
        return files


class _Restore:
    """Puts optimizer, schedule and random state back, when the loop asks for them."""

    def __init__(self, bundle: Bundle, rank: int, world: int, seed: int, report: Reporter) -> None:
        self.bundle, self.rank, self.world, self.seed, self.report = bundle, rank, world, seed, report
        self.step = bundle.step

    def optimizer(self, trainer: SupervisedTrainer) -> None:
        state.load_optimizer(trainer.optimizer, trainer.model, self.bundle.path, trainer.accelerator.scaler)
        state.load_scheduler(trainer.lr_scheduler, self.bundle.path)

    def rng(self, trainer: SupervisedTrainer) -> None:
        state.load_rng(self.bundle.path, self.rank, self.world, self.seed, self.bundle.step, self.report)
