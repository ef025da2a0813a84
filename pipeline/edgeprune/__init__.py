"""edgeprune: a plan shrinks a model; a target compiles and times it; a score compares it with a budget.

The nouns (plan, profile, budget, artifact, measurement, trial) import the standard library only, so that
``import edgeprune`` costs nothing; torch, onnx and onnxruntime are imported by the modules that need them.
"""

import os

__version__ = "0.1.0"

# ONNX Runtime reports on its use from 1.29 on unless it is told not to, from a thread of its own: nobody asked for the
# report, and the thread disturbs what is timed. Workers inherit it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
