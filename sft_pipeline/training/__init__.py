"""What the model stages share: model, data, loss, trainer, checkpoint; what needs torch and what does not.

config.py       the model and training sections of a recipe
base.py         where the base model is                                  (no torch)
model.py        loading and saving: base, adapters, checkpoints
shards.py       packed blocks and the update plan, read from Parquet     (no torch)
data.py         from the blocks of an update to micro-batches
loss.py         cross-entropy at supervised positions
schedule.py     the learning rate of every update                        (no torch)
trainer.py      TRL's SFTTrainer over the update plan
checkpoint.py   what a checkpoint holds; written whole, verified, put back
generate.py     replies and scores of a model
progress.py     numbers of an update, curves, who listens                (no torch)
memory.py       memory: estimated before, measured during                (no torch)
flops.py        time and utilization, from the arithmetic                (no torch)
process.py      every setting that holds for the whole process
"""

from sft_pipeline.training.process import set_environment

set_environment()
