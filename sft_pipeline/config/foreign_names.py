"""What other trainers call the keys of a recipe: for suggestions, and for `sft import`.

Names are those of transformers' TrainingArguments and TRL's SFTConfig, PEFT's LoraConfig, axolotl and
LLaMA-Factory.
"""

KEYS: dict[str, str] = {
    # the model
    "model_name_or_path": "model.base",
    "base_model": "model.base",
    "model_id": "model.base",
    "model": "model.base",
    "model_revision": "model.revision",
    "revision_of_model": "model.revision",
    "tokenizer_name": "model.tokenizer",
    "tokenizer_name_or_path": "model.tokenizer",
    "trust_remote_code": "model.trust_remote_code",
    "attn_implementation": "model.attention",
    # adapters
    "r": "model.lora.r",
    "lora_r": "model.lora.r",
    "lora_rank": "model.lora.r",
    "lora_alpha": "model.lora.alpha",
    "lora_dropout": "model.lora.dropout",
    "target_modules": "model.lora.target_modules",
    "lora_target": "model.lora.target_modules",
    "lora_target_modules": "model.lora.target_modules",
    # rows and tokens
    "max_length": "tokens.max_length",
    "max_seq_length": "tokens.max_length",
    "max_seq_len": "tokens.max_length",
    "sequence_len": "tokens.max_length",
    "cutoff_len": "tokens.max_length",
    "model_max_length": "tokens.max_length",
    "chat_template": "template.chat_template",
    # training
    "lr": "training.learning_rate",
    "learning_rate": "training.learning_rate",
    "num_train_epochs": "training.epochs",
    "num_epochs": "training.epochs",
    "epochs": "training.epochs",
    "max_steps": "training.max_steps",
    "batch_size": "training.per_device_batch",
    "micro_batch_size": "training.per_device_batch",
    "per_device_train_batch_size": "training.per_device_batch",
    "train_batch_size": "training.per_device_batch",
    "gradient_accumulation_steps": "training.gradient_accumulation",
    "warmup_ratio": "training.warmup",
    "lr_scheduler_type": "training.schedule",
    "lr_scheduler": "training.schedule",
    "weight_decay": "training.weight_decay",
    "adam_epsilon": "training.adam_epsilon",
    "max_grad_norm": "training.clip",
    "gradient_checkpointing": "training.gradient_checkpointing",
    "neftune_noise_alpha": "training.neftune_alpha",
    "torch_compile": "training.compile",
    "eval_steps": "training.eval_steps",
    "save_steps": "training.save_steps",
    "save_total_limit": "training.keep_checkpoints",
    "nproc_per_node": "training.processes",
    "seed": "training.seed",
    # evaluation and export
    "max_new_tokens": "evaluation.max_new_tokens",
    "val_set_size": "split.validation",
    "val_size": "split.validation",
}
"""Their name -> ours, a dotted key of a recipe (`split.validation` is one of a dataset)."""

DONE_OTHERWISE: dict[str, str] = {
    "output_dir": "what is written lies under SFT_HOME",
    "logging_dir": "what is written lies under SFT_HOME",
    "run_name": "runs are named by recipe and snapshot",
    "overwrite_output_dir": "artifacts are addressed by what they are made of; nothing is overwritten",
    "logging_steps": "every update is recorded",
    "dataset_text_field": "`columns` in the dataset file maps fields",
    "dataset_num_proc": "SFT_WORKERS sets the worker processes",
    "preprocessing_num_workers": "SFT_WORKERS sets the worker processes",
    "template": "template.chat_template: the tokenizer's own, a named one, or a Jinja file",
    "dataset": "a dataset file with its sources; `sft init` writes one",
    "datasets": "a dataset file with its sources; `sft init` writes one",
    "dataset_name": "a dataset file with its sources; `sft init` writes one",
    "dataset_dir": "a dataset file with its sources; `sft init` writes one",
    "packing": "packing.strategy: bfd packs, none does not",
    "sample_packing": "packing.strategy: bfd packs, none does not",
    "pad_to_sequence_len": "blocks are not padded",
    "group_by_length": "packing.strategy: bfd makes it needless",
    "bf16": "training.precision: bf16, fp16, fp32 or auto",
    "fp16": "training.precision: bf16, fp16, fp32 or auto",
    "tf32": "training.precision: bf16, fp16, fp32 or auto",
    "load_in_4bit": "model.parameterization: qlora",
    "load_in_8bit": "model.parameterization: qlora quantizes to 4 bits; there is no 8-bit base",
    "quantization_bit": "model.parameterization: qlora",
    "adapter": "model.parameterization: lora, qlora or full",
    "finetuning_type": "model.parameterization: lora, qlora or full",
    "use_peft": "model.parameterization: lora, qlora or full",
    "train_on_inputs": "tokens.supervise: completion trains on replies, all on everything",
    "train_on_prompt": "tokens.supervise: completion trains on replies, all on everything",
    "completion_only_loss": "tokens.supervise: completion trains on replies, all on everything",
    "assistant_only_loss": "tokens.supervise: assistant trains on all replies",
    "mask_history": "tokens.supervise: completion trains on the last reply only",
    "warmup_steps": "training.warmup is a fraction of the updates",
    "adam_beta1": "training.adam_betas: [beta1, beta2]",
    "adam_beta2": "training.adam_betas: [beta1, beta2]",
    "per_device_eval_batch_size": "evaluation divides its batches by length itself",
    "evaluation_strategy": "training.eval_steps; every evaluation is a checkpoint",
    "eval_strategy": "training.eval_steps; every evaluation is a checkpoint",
    "save_strategy": "training.save_steps; a checkpoint at every evaluation where it is null",
    "load_best_model_at_end": "evaluation.rank_by chooses the checkpoint that is exported",
    "metric_for_best_model": "evaluation.rank_by chooses the checkpoint that is exported",
    "push_to_hub": "the exported model is a folder that can be uploaded",
    "hub_token": "HF_TOKEN in the environment",
    "wandb_project": "training.report_to: [wandb], and WANDB_PROJECT in the environment",
    "resume_from_checkpoint": "a killed run goes on by itself when it is started again",
    "optim": "AdamW; other optimizers are not there",
    "optimizer": "AdamW; other optimizers are not there",
    "do_train": "`sft run`",
    "do_eval": "`sft run`",
    "stage": "this is supervised fine-tuning only",
    "task_type": "causal language models only",
    "bias": "adapters have no bias",
}
"""Their name -> how it is said or done here."""


def hint(name: str) -> str:
    """What a foreign name is here, for a message; empty where it is not known."""
    plain = name.strip().lstrip("-").replace("-", "_")
    if ours := KEYS.get(plain):
        return f"it is {ours} here"
    return DONE_OTHERWISE.get(plain, "")
