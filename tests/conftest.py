"""Tests run with one thread that waits without spinning, before anything loads torch."""

import os

# Threads that spin while they wait starve whatever else runs on a small machine. Read once, when OpenMP starts.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)
