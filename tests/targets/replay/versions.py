"""Which flags each TensorRT's trtexec takes, and what it calls itself; facts of its option parser."""

EVERY = """
onnx saveEngine loadEngine memPoolSize profilingVerbosity timingCacheFile warmUp duration iterations avgRuns percentile
exportTimes exportProfile exportOutput exportLayerInfo dumpProfile dumpLayerInfo loadInputs separateProfileRun
useCudaGraph useSpinWait noDataTransfers exposeDMA idleTime sleepTime useDLACore allowGPUFallback refit verbose device
""".split()
WEAK = "fp16 int8 best calib precisionConstraints layerPrecisions".split()

FLAGS = {
    "8.2": [*(set(EVERY) - {"memPoolSize", "profilingVerbosity", "exportLayerInfo"}), *WEAK, "workspace", "buildOnly",
            "explicitBatch", "streams"],
    "8.4": [*EVERY, *WEAK, "workspace", "buildOnly", "explicitBatch", "streams"],
    "8.5": [*EVERY, *WEAK, "workspace", "buildOnly", "explicitBatch", "streams"],
    "8.6": [*EVERY, *WEAK, "fp8", "workspace", "buildOnly", "skipInference", "explicitBatch", "infStreams",
            "builderOptimizationLevel", "versionCompatible", "hardwareCompatibilityLevel", "dumpRawBindingsToFile"],
    "10.3": [*EVERY, *WEAK, "fp8", "bf16", "int4", "skipInference", "infStreams", "builderOptimizationLevel",
             "versionCompatible", "hardwareCompatibilityLevel", "dumpRawBindingsToFile", "stronglyTyped",
             "errorOnTimingCacheMiss", "getPlanVersionOnly", "stripWeights"],
    "10.13": [*EVERY, *WEAK, "fp8", "bf16", "int4", "skipInference", "infStreams", "builderOptimizationLevel",
              "versionCompatible", "hardwareCompatibilityLevel", "dumpRawBindingsToFile", "stronglyTyped",
              "errorOnTimingCacheMiss", "getPlanVersionOnly", "stripWeights", "maxTactics", "tilingOptimizationLevel"],
    "11.1": [*EVERY, "skipInference", "infStreams", "builderOptimizationLevel", "versionCompatible",
             "hardwareCompatibilityLevel", "dumpRawBindingsToFile", "stronglyTyped", "errorOnTimingCacheMiss",
             "getPlanVersionOnly", "stripWeights", "maxTactics", "tilingOptimizationLevel", "noCudaGraph", "noSpinWait",
             "includeDataTransfers", "loadRefOutputs", "accuracyAlgorithm", "atol", "rtol"],
}  # fmt: skip
FLAGS["12.0"] = FLAGS["11.1"]

NUMBER = {
    "8.2": "v8201",
    "8.4": "v8401",
    "8.5": "v8502",
    "8.6": "v8602",
    "10.3": "v100300",
    "10.13": "v101300] [b35",
    "11.1": "v110100",
    "12.0": "v120000",
}


def major(version: str) -> int:
    return int(version.partition(".")[0])


def minor(version: str) -> int:
    return int(version.partition(".")[2])
