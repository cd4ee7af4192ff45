"""This pipeline's trainer and TRL's SFTTrainer, on the same rows and the same weights.

    python bench/train.py                       three to four minutes on 2 cores: two vocabularies, LoRA
    python bench/train.py --full                1k, 49k and 152k, LoRA and full; on a GPU 1B and 8B
    python bench/train.py --gpu-settings --hidden 64 --tokens 256     the GPU's settings, small, without one

What is compared, and how it is kept fair:

- One model, made by the same function from the same seed, fp32 on a CPU and bf16 on a GPU; LoRA (r 16 on
  all linear layers) or all weights; one optimizer, learning rate and clipping. That the trainings are the
  same is seen in the losses of the updates, whose largest difference is printed.
- One set of rows, 30 % supervised, in blocks that are full, so that packing wastes nothing. An update
  holds the same examples in every system; TRL accumulates the micro-batches of 2,048 tokens (4,096 on a
  GPU) that make it.
- This pipeline reads packed shards and lays them out as its device likes it. TRL has its rows in memory,
  prepared, in four configurations: packed (`packing`, `padding_free`) and plainly padded, each with its
  own fused loss and with whole logits. The padded one gets the rows of an update sorted by length, which
  wastes least. Its defaults that would slow it down on a CPU, bf16 and activation checkpointing, are off.
  With Liger installed on a GPU, its layer kernels are tried with the fused loss too.
- Each measurement is a fresh process. The time to the first update begins when everything is imported:
  model, trainer and one update. Speed is the median over the later updates. Peak memory is the process's
  resident size at its highest (on a GPU, its allocated memory), imports and building of the model
  included.
- The first round has all systems. TRL's fastest then goes on against this pipeline, taking turns, every
  other round backwards; ratios are taken within a round, and medians over the rounds.
- On a busy machine wall time says little, so CPU time of all threads is beside it. OpenMP threads wait
  asleep on all systems (OMP_WAIT_POLICY=passive): spinning ones would make every system slower where
  anything else runs.
- MFU: what an update must compute (`sft_pipeline.training.flops`) over the bf16 peak that the maker
  states.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from report import machine
from training.compare import Compared, compare, losses, show, summary
from training.setting import KINDS, VOCABULARIES, Setting, cpu_settings, gpu_settings
from training.systems import LIGER_SYSTEMS, SYSTEMS

QUICK_VOCABULARIES = ("1k", "49k")
QUICK_KINDS = ("lora",)
HIDDEN, TOKENS = 256, 2_048


def main() -> None:
    options = _options()
    gpu = _gpu()
    settings = _settings(options, gpu)
    about = machine() | ({"gpu": gpu} if gpu else {})
    print("\n".join(f"{key}: {value}" for key, value in about.items()))
    found = [_compare(setting, options, gpu) for setting in settings]
    print(f"\n### Targets\n\n{summary(found)}\n\nload after: {os.getloadavg()[0]:.1f}")
    if options.json:
        results: dict[str, Any] = {"machine": about, "settings": [c.to_json() for c in found]}
        options.json.write_text(json.dumps(results, indent=1))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="all vocabularies and kinds")
    parser.add_argument("--vocabularies", nargs="+", choices=VOCABULARIES, help="on a CPU")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="on a CPU")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--updates",
        type=int,
        help="of each training, the first of which is not in the speed (2, with --full 3)",
    )
    parser.add_argument(
        "--hidden", type=int, help=f"width of the model ({HIDDEN}; the GPU's settings have their own)"
    )
    parser.add_argument("--tokens", type=int, help=f"of a block ({TOKENS}; on a GPU 4,096)")
    parser.add_argument(
        "--gpu-settings", action="store_true", help="1B and 8B even without a GPU: give --hidden and --tokens"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write every measurement here")
    options = parser.parse_args()
    options.updates = options.updates or (3 if options.full else 2)
    if options.updates < 2:
        parser.error("--updates: at least 2, since the first one is not in the speed")
    return options


def _settings(options: argparse.Namespace, gpu: str | None) -> list[Setting]:
    if options.gpu_settings and not gpu and not options.hidden:
        sys.exit("--gpu-settings without a GPU needs --hidden (and --tokens), or it takes days")
    if options.gpu_settings or (gpu and not options.vocabularies):
        found = gpu_settings(options.hidden, options.tokens)
        return found if options.full or options.gpu_settings else found[:1]
    return cpu_settings(
        options.vocabularies or list(VOCABULARIES if options.full else QUICK_VOCABULARIES),
        options.kinds or list(KINDS if options.full else QUICK_KINDS),
        options.hidden or HIDDEN,
        options.tokens or TOKENS,
    )


def _compare(setting: Setting, options: argparse.Namespace, gpu: str | None) -> Compared:
    liger = LIGER_SYSTEMS if gpu and importlib.util.find_spec("liger_kernel") else {}
    systems = [*SYSTEMS, *liger]
    found = compare(setting, systems, updates=options.updates, rounds=options.rounds, device=gpu)
    print(
        f"\n### {setting.name}: vocabulary {setting.vocabulary:,}, hidden {setting.hidden:,}, "
        f"{setting.layers} layers, {setting.precision}, "
        f"{setting.blocks} x {setting.tokens:,} tokens an update, "
        f"{found.per_update['supervised']:,.0f} of them supervised, {options.rounds} rounds\n"
    )
    print(f"{show(found)}\n\n{losses(found)}", flush=True)
    return found


def _gpu() -> str | None:
    """Its name. Asked in another process, so that this one stays small and holds no device."""
    ask = "import torch; print(torch.cuda.get_device_name(0) if torch.cuda.is_available() else '')"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    return done.stdout.strip() or None


if __name__ == "__main__":
    main()
