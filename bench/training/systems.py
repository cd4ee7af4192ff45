"""The trainings that are measured. Each runs in a process of its own: `python -m training.systems RESULT`.

A system imports everything, puts what it reads where it likes it best, and is ready. Then the clock starts:
the model is built, the trainer is constructed, and the updates are made.
"""

import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.setting import Setting, packed, padded

RATE = 1e-4
Work = Callable[[], Any]  # builds and trains, and hands back what must stay alive


@dataclass(frozen=True)
class Job:
    """One measurement.

    Attributes:
        system: A key of `SYSTEMS`.
        setting: As a dict, as it comes through JSON.
        rows: The folder that `write_rows` filled.
        updates: How many are made.
    """

    system: str
    setting: dict[str, Any]
    rows: str
    updates: int


class Record:
    """When the training began, when each update was done, and its loss."""

    def __init__(self) -> None:
        self.began = 0.0
        self.done: list[float] = []
        self.cpu: list[float] = []
        self.losses: list[float] = []

    def callback(self) -> Any:
        from transformers import TrainerCallback

        record = self

        class Clock(TrainerCallback):
            def on_step_end(self, args, state, control, **_):
                _synchronize()
                record.done.append(time.perf_counter())
                record.cpu.append(time.process_time())

            def on_log(self, args, state, control, logs=None, **_):
                if logs and "loss" in logs:
                    record.losses.append(logs["loss"])

        return Clock()


def ours(job: Job, record: Record) -> Work:
    """This pipeline's trainer, from the packed shards, set up as the stage trained_checkpoints does it."""

    from sft_pipeline.training.config import ModelConfig, TrainingConfig
    from sft_pipeline.training.data import layout_for, make_feed
    from sft_pipeline.training.process import be_deterministic
    from sft_pipeline.training.progress import Listener
    from sft_pipeline.training.schedule import Schedule
    from sft_pipeline.training.shards import Plan, Shards
    from sft_pipeline.training.trainer import SupervisedTrainer

    setting, folder = Setting(**job.setting), Path(job.rows)
    training = TrainingConfig(
        learning_rate=RATE,
        schedule="constant",
        warmup=0,
        per_device_batch=1,
        seed=setting.seed,
        gradient_checkpointing=setting.checkpointing,
        precision=setting.precision,  # type: ignore[arg-type]
    )
    tokenizer = _tokenizer()

    class LossListener(Listener):
        def updated(self, numbers: Any) -> None:
            record.losses.append(numbers.loss)

    def work() -> Any:
        be_deterministic(setting.seed)
        model = build_model(setting)
        device, attention = next(model.parameters()).device, model.config._attn_implementation
        feed = make_feed(
            Shards([folder / "train.parquet"]),
            Plan(folder / "plan.parquet"),
            training,
            layout=layout_for(device, attention),
            updates=job.updates,
        )
        trainer = SupervisedTrainer(
            model,
            feed=feed,
            validation=None,
            tokenizer=tokenizer,
            training=training,
            schedule=Schedule.of(training, ModelConfig(base="random")),
            precision=setting.precision,
            folder=Path(tempfile.gettempdir()) / "unused",
            listener=LossListener(),
        )
        trainer.add_callback(record.callback())
        trainer.run()
        return trainer

    return work


def trl(job: Job, record: Record, *, pack: bool, fused: bool, liger: bool = False) -> Work:
    """TRL's SFTTrainer on the same rows, which are in memory already and not prepared again.

    Args:
        pack: Blocks with `packing` and `padding_free`; else padded batches of as many examples as a block
        holds. fused: Its own output projection with the loss; else the model's whole logits and transformers'
        loss, as its
            documentation advises to do it, by overriding `compute_loss`. Entropy and accuracy fall away with
            it.
        liger: The kernels of Liger for the layers.
    """
    import pyarrow.parquet as pq
    from datasets import Dataset
    from transformers import Trainer
    from trl import SFTConfig, SFTTrainer

    setting = Setting(**job.setting)
    blocks = pq.read_table(Path(job.rows) / "train.parquet").to_pylist()
    dataset = Dataset.from_list(packed(blocks) if pack else padded(blocks, setting))
    tokenizer = _tokenizer()
    cpu = not _on_gpu()

    class WholeLogits(SFTTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return Trainer.compute_loss(self, *args, **kwargs)

    def work() -> Any:
        model = build_model(setting)
        arguments = SFTConfig(
            output_dir=str(Path(tempfile.gettempdir()) / "unused"),
            max_steps=job.updates,
            seed=setting.seed,
            per_device_train_batch_size=1 if pack else setting.examples,
            gradient_accumulation_steps=setting.blocks,
            packing=pack,
            padding_free=pack,
            max_length=setting.tokens if pack else None,
            dataset_kwargs={"skip_prepare_dataset": True},
            train_sampling_strategy="sequential",
            learning_rate=RATE,
            lr_scheduler_type="constant",
            warmup_steps=0,
            weight_decay=0.01,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            bf16=setting.precision == "bf16",
            activation_checkpointing=setting.checkpointing,
            activation_checkpointing_kwargs={"use_reentrant": False} if setting.checkpointing else None,
            use_cpu=cpu,
            dataloader_pin_memory=not cpu,
            dataloader_num_workers=0,
            use_liger_kernel=liger,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = (SFTTrainer if fused else WholeLogits)(
            model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer
        )
        trainer.add_callback(record.callback())
        trainer.train()
        return trainer

    return work


SYSTEMS: dict[str, Callable[[Job, Record], Work]] = {
    "sft_pipeline": ours,
    "TRL packed, fused loss": lambda job, record: trl(job, record, pack=True, fused=True),
    "TRL packed, whole logits": lambda job, record: trl(job, record, pack=True, fused=False),
    "TRL padded, fused loss": lambda job, record: trl(job, record, pack=False, fused=True),
    "TRL padded, whole logits": lambda job, record: trl(job, record, pack=False, fused=False),
}
LIGER_SYSTEMS: dict[str, Callable[[Job, Record], Work]] = {
    "TRL packed, fused loss, Liger": lambda job, record: trl(job, record, pack=True, fused=True, liger=True),
    "TRL padded, fused loss, Liger": lambda job, record: trl(job, record, pack=False, fused=True, liger=True),
}


def build_model(setting: Setting) -> Any:
    """The model of a setting, on its device, ready to be trained; the same weights in every system.

    As the pipeline holds them: frozen weights in the precision of the computation, trained ones in fp32.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from sft_pipeline.training.adapters import add_adapter
    from sft_pipeline.training.config import LoraConfig, ModelConfig
    from sft_pipeline.training.model import DTYPES, resolve_attention, training_device

    device = training_device()
    config = LlamaConfig(
        vocab_size=setting.vocabulary,
        hidden_size=setting.hidden,
        intermediate_size=setting.intermediate,
        num_hidden_layers=setting.layers,
        num_attention_heads=setting.heads,
        num_key_value_heads=setting.kv_heads,
        max_position_embeddings=max(4_096, setting.tokens),
        tie_word_embeddings=setting.tied,
        use_cache=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    lora = setting.parameterization == "lora"
    torch.manual_seed(setting.seed)
    with device:
        model = LlamaForCausalLM._from_config(
            config,
            attn_implementation=resolve_attention("auto", device, LlamaForCausalLM),
            dtype=DTYPES[setting.precision] if lora else torch.float32,
        )
    if lora:
        adapter = ModelConfig(base="random", lora=LoraConfig(dropout=0.0))
        model = add_adapter(model, adapter, gradient_checkpointing=setting.checkpointing)
    return model.train()


def _tokenizer() -> Any:
    """The trainers only read its special tokens."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def _on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _flops(model: Any, setting: Setting) -> float:
    """What an update must compute, whatever a system really computes."""
    from sft_pipeline.training.flops import arithmetic

    counted = arithmetic(model)
    assert counted
    tokens = setting.tokens * setting.blocks
    return counted.of(tokens, round(tokens * setting.supervised), setting.examples * setting.blocks)


def _peak() -> float:
    """Bytes: of the GPU where there is one, else the peak resident size of this process."""
    import torch

    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def _main() -> None:
    """Reads a job from standard input; writes what was measured to the file named by the first argument."""
    import sft_pipeline.training.trainer  # noqa: F401  # before torch, whose threads it sets; imports are not timed
    import torch  # isort: skip

    job = Job(**json.load(sys.stdin))
    record = Record()
    work = (SYSTEMS | LIGER_SYSTEMS)[job.system](job, record)
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")  # its context is no part of a training
    before = _peak()
    record.began = time.perf_counter()
    trainer = work()
    _synchronize()
    times = [b - a for a, b in zip([record.began, *record.done], record.done)]
    figures = {
        "first": times[0],
        "seconds": times[1:],
        "cpu_seconds": [b - a for a, b in zip(record.cpu, record.cpu[1:])],
        "losses": record.losses,
        "peak": _peak(),
        "before": before,
        "threads": torch.get_num_threads(),
        "layout": trainer.feed.layout if job.system == "sft_pipeline" else "",
        "flops": _flops(trainer.model, Setting(**job.setting)),
        "attention": trainer.accelerator.unwrap_model(trainer.model).config._attn_implementation,
    }
    Path(sys.argv[1]).write_text(json.dumps(figures))


if __name__ == "__main__":
    _main()
