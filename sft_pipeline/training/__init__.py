"""What the model stages share: loading, feeding, loss, the trainer, generation. Imported only where torch runs."""

import os

# Threads that wait for work sleep instead of spinning. Read once by OpenMP, when torch is imported. Two OpenMP pools
# (torch's and bitsandbytes') or a busy machine otherwise fight for the cores: on 2 cores under load a training step
# took 2.0 s spinning and 0.4 s asleep, a 4-bit forward 310 ms and 7 ms.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# TRL reports each trainer that is made to the hub's maker.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
