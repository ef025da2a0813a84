"""edgeprune: a plan shrinks a model; a target compiles and times it; a score compares it with a budget.

The nouns (plan, profile, budget, artifact, measurement, trial) import the standard library only, so that
``import edgeprune`` costs nothing; torch, onnx and onnxruntime are imported by the modules that need them.
"""

__version__ = "0.1.0"
