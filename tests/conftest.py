"""Tests run with one thread that waits without spinning, before anything loads torch; and can be interrupted."""

import os
import signal

# Threads that spin while they wait starve whatever else runs on a small machine. Read once, when OpenMP starts.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from hypothesis import settings

# `make test` tries the same examples every time, so that it tells of a change and never of luck. To look for new ones:
# pytest --hypothesis-profile=explore
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("explore", max_examples=2000, deadline=None)
settings.load_profile("repeatable")

torch.set_num_threads(1)

# A shell that starts the tests in the background has interrupts ignored, and so would every process of theirs.
signal.signal(signal.SIGINT, signal.default_int_handler)
