"""How long a training takes on this machine's CPUs, very roughly, from its own matrix products. Light: no torch."""

import time
from functools import lru_cache

import numpy as np

# Share of a matrix product's peak that a training step reaches, and floating-point operations per parameter and token
# forward and backward (Kaplan et al. 2020). Good for an order of magnitude; the sanity check measures.
UTILISATION = 0.3
FLOPS_PER_PARAMETER_AND_TOKEN = 6
SIZE, ROUNDS = 768, 10


def training_seconds(parameters: int, tokens: int) -> float:
    """Seconds of training on so many tokens."""
    return tokens * parameters * FLOPS_PER_PARAMETER_AND_TOKEN / (_flops_per_second() * UTILISATION)


@lru_cache
def _flops_per_second() -> float:
    a = np.ones((SIZE, SIZE), dtype=np.float32)
    a @ a
    start = time.perf_counter()
    for _ in range(ROUNDS):
        a @ a
    return ROUNDS * 2 * SIZE**3 / (time.perf_counter() - start)
