"""What this process has of the memory: of its GPU, or resident on a CPU."""

import os
import resource
import sys

import psutil
import torch


def memory_mb() -> float:
    """Peak GPU memory of this process, or its resident memory on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return psutil.Process(os.getpid()).memory_info().rss / 2**20


def peak_memory_mb() -> float:
    """The most that this process has had so far: of the GPU's memory, or resident on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 1 if sys.platform == "darwin" else 2**10  # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def memory_slack_mb() -> float:
    """What a GPU's allocator has reserved and does not use; 0 on a CPU."""
    if not torch.cuda.is_available():
        return 0.0
    return (torch.cuda.max_memory_reserved() - torch.cuda.max_memory_allocated()) / 2**20
