"""Tests run with one thread that waits without spinning, before anything loads torch; and can be interrupted."""

import os
import signal

# Threads that spin while they wait starve whatever else runs on a small machine. Read once, when OpenMP starts.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)

# A shell that starts the tests in the background has interrupts ignored, and so would every process of theirs.
signal.signal(signal.SIGINT, signal.default_int_handler)
