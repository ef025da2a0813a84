"""A stand-in for trtexec on a board that is no board: true flags and logs of each version, a made-up latency, and real
outputs, computed with ONNX Runtime. It lives with the tests, and nothing but the tests can reach it.

What it does wrong, and when, stands in the JSON file that EDGEPRUNE_REPLAY names:

    version     of TensorRT, a key of `versions.FLAGS`
    fault       "hang", "crash", "killed", "reboot", "memory", "full", "lie", "shout", "escape", "garbage", "unstable"
    fault_at    "build" (the default), "time", "answer" or "profile"
    realtime    take as long as it says it does
    slow        every latency times this
    boot_file   the file that a reboot rewrites
    rewrite     file → content, written when calls are timed
    pid_file    is told the process that hangs

Every command line is appended to the file beside that one that ends in ``.log``.
"""

import json
import math
import os
import random
import re
import signal
import struct
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import versions

CONFIG: dict[str, Any] = json.loads(Path(os.environ["EDGEPRUNE_REPLAY"]).read_text())
VERSION: str = CONFIG["version"]
MAJOR, MINOR = versions.major(VERSION), versions.minor(VERSION)
MAGIC = b"REPLAYENGINE\n"
CALLS_CAP = 1_000
NOISE = 0.004
OPERATORS = """
Add AveragePool BatchNormalization Cast Clip Concat Conv ConvTranspose DequantizeLinear Div Flatten Gemm
GlobalAveragePool HardSigmoid HardSwish Identity LeakyRelu MatMul MaxPool Mul Pad QuantizeLinear ReduceMean Relu Reshape
Resize Shape Sigmoid Slice Softmax Squeeze Sub Tanh Transpose Unsqueeze Constant
"""
FUSED = ("Relu", "Clip", "BatchNormalization")
BLOCK = {"fp32": 4, "fp16": 8, "int8": 32}
MACS_PER_NS = {"fp32": 20.0, "fp16": 40.0, "int8": 80.0}
FORMAT = {
    "fp32": "Row major linear FP32",
    "fp16": "Channel major FP16 format where channel % 8 == 0",
    "int8": "Int8 NC/32HW32",
}


class Stop(Exception):
    """An error that trtexec prints before it ends with status 1."""


def say(level: str, text: str, library: bool = False) -> None:
    stamp = time.strftime("%m/%d/%Y-%H:%M:%S")
    print(f"[{stamp}] [{level}] {'[TRT] ' if library else ''}{text}", flush=True)


def banner(word: str) -> None:
    number = versions.NUMBER[VERSION]
    print(f"&&&& {word} TensorRT.trtexec [TensorRT {number}] # {' '.join(['trtexec', *sys.argv[1:]])}", flush=True)


def main() -> int:
    with Path(os.environ["EDGEPRUNE_REPLAY"]).with_suffix(".log").open("a") as log:
        log.write(" ".join(sys.argv[1:]) + "\n")
    banner("RUNNING")
    if "--help" in sys.argv:
        return usage()
    try:
        options = parsed(sys.argv[1:])
        act(options)
    except Stop as error:
        for line in str(error).splitlines():
            say("E", line)
        if MAJOR < 11 or "Unknown option" not in str(error):
            banner("FAILED")
        return 1
    banner("PASSED")
    return 0


def usage() -> int:
    print("=== Options (a short list of ours) ===")
    for flag in sorted(versions.FLAGS[VERSION]):
        print(f"  --{flag}")
    return 0


def parsed(words: list[str]) -> dict[str, str]:
    options = {}
    for word in words:
        name, _, value = word.removeprefix("--").partition("=")
        if name not in versions.FLAGS[VERSION] or not word.startswith("--"):
            usage()
            raise Stop(f"Unknown option: {word.partition('=')[0]} {value}")
        options[name] = value
    return options


def act(options: dict[str, str]) -> None:
    if "loadInputs" in options:
        part = "answer"
    elif "exportProfile" in options:
        part = "profile"
    else:
        part = "build" if "onnx" in options else "time"
    misbehave(part)
    say("I", "=== Device Information ===")
    say("I", "Selected Device: Orin")
    say("I", "Compute Capability: 8.7")
    say("I", "SMs: 8")
    if part == "build":
        build(options)
        return
    engine = load(options["loadEngine"])
    if part == "answer":
        answer(options, engine)
    elif part == "profile":
        profile(options, engine)
    else:
        time_calls(options, engine)


def misbehave(part: str) -> None:
    for name, content in CONFIG.get("rewrite", {}).items() if part == "time" else ():
        Path(name).write_text(content)
    fault = CONFIG.get("fault")
    if not fault or CONFIG.get("fault_at", "build") != part:
        return
    if fault == "hang":
        Path(CONFIG["pid_file"]).write_text(f"{os.getpid()}\n")
        time.sleep(3600)
    if fault == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "reboot":
        Path(CONFIG["boot_file"]).write_text(f"{uuid.uuid4()}\n")
    if fault == "memory":
        raise Stop("1: [defaultAllocator.cpp::allocate::19] Error Code 1: Cuda Runtime (out of memory)")
    if fault == "device":
        raise Stop("Cuda failure: no CUDA-capable device is detected")
    if fault == "shout":
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        while True:
            sys.stdout.write("x" * 65536)
    if fault == "escape":
        print("\x1b[2J\x1b]0;owned\x07")
        raise Stop("\x1b[31mError Code 4: \x1b[0mnode \x07 failed")


# -- building -------------------------------------------------------------------------------------------------------


def build(options: dict[str, str]) -> None:
    import onnx

    source = Path(options["onnx"])
    try:
        model = onnx.load(str(source), load_external_data=False)
    except Exception as error:
        raise Stop(f"Failed to parse ONNX model from file: {source}: {type(error).__name__}") from error
    if not model.graph.output:
        raise Stop(f"Failed to parse ONNX model from file: {source}: no graph")
    refuse(model)
    weak = next((each for each in ("int8", "fp16") if each in options), "fp32")
    if "stronglyTyped" in options and weak != "fp32":
        say("W", f"Invalid usage, setting {weak} mode is not allowed if graph is strongly typed. Disabling it.")
    cache(options.get("timingCacheFile"))
    lies = CONFIG.get("fault") == "lie"
    layers = layers_of(model, weak if MAJOR < 10 and not lies else "fp32")
    seconds = 1.5 + 0.4 * len(layers)
    header = {"number": versions.NUMBER[VERSION], "layers": layers, "graph": model.graph.name}
    say(
        "W",
        "Tactic Device request: 4229MB Available: 2658MB. Device memory is insufficient to use tactic.",
        library=True,
    )
    save(Path(options["saveEngine"]), header, source.read_bytes())
    if "exportLayerInfo" in options:
        detailed = options.get("profilingVerbosity") == "detailed"
        Path(options["exportLayerInfo"]).write_text(layer_info(layers, detailed))
    say("I", f"Engine built in {seconds:.4f} sec.")
    if MAJOR >= 10:
        say("I", "Created engine with size: 8.12 MiB")
    if "skipInference" in options or "buildOnly" in options:
        say("I", "Skipped inference phase since --skipInference is added.")


def refuse(model: Any) -> None:
    known = set(OPERATORS.split())
    for place, node in enumerate(model.graph.node):
        if node.op_type not in known:
            raise Stop(
                f"ModelImporter.cpp:771: While parsing node number {place} [{node.op_type}]:\n"
                f"Plugin not found, are the plugin name, version, and namespace correct?"
            )


def cache(name: str | None) -> None:
    if name is None:
        return
    place, mine = Path(name), f"replay timing cache of {versions.NUMBER[VERSION]}\n"
    if place.exists() and not place.read_text(errors="replace").startswith(mine):
        raise Stop(f"TimingCache creation failed: {place.name} cannot be read")
    with place.open("a") as stream:
        if place.stat().st_size == 0:
            stream.write(mine)
        stream.write("entry\n")


def layers_of(model: Any, permitted: str) -> list[dict[str, Any]]:
    """Return the engine's layers: convolutions and products with what is fused behind them, and the rest on its own."""
    import onnx

    shapes = shapes_of(onnx.shape_inference.infer_shapes(model))
    makers = {output: node for node in model.graph.node for output in node.output}
    half = {each.name for each in model.graph.initializer if each.data_type == onnx.TensorProto.FLOAT16}
    layers: list[dict[str, Any]] = []
    for place, node in enumerate(model.graph.node):
        name = node.name or f"{node.op_type}_{place}"
        if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            kind = precision_of(node, makers, half, permitted)
            layers.append({"name": name, "ms": cost_ms(node, shapes, kind), "type": kind, "output": node.output[0]})
        elif (
            node.op_type in ("Relu", "Clip", "BatchNormalization") and layers and node.input[0] == layers[-1]["output"]
        ):
            layers[-1] |= {"name": f"{layers[-1]['name']} + {name}", "output": node.output[0]}
        elif node.op_type == "Cast":
            text = f"Reformatting CopyNode for Input Tensor 0 to {name}"
            layers.append({"name": text, "ms": 0.002, "type": "fp32", "output": node.output[0]})
        elif node.op_type not in ("Constant", "QuantizeLinear", "DequantizeLinear", "Flatten", "Reshape", "Identity"):
            layers.append({"name": name, "ms": 0.003, "type": permitted, "output": node.output[0]})
    return layers


def shapes_of(model: Any) -> dict[str, tuple[int, ...]]:
    values = [*model.graph.input, *model.graph.value_info, *model.graph.output]
    shapes = {each.name: tuple(size.dim_value for size in each.type.tensor_type.shape.dim) for each in values}
    return shapes | {each.name: tuple(each.dims) for each in model.graph.initializer}


def precision_of(node: Any, makers: dict[str, Any], half: set[str], permitted: str) -> str:
    if CONFIG.get("fault") == "lie":
        return "fp32"
    feeders = [makers[each].op_type for each in node.input[:2] if each in makers]
    if "DequantizeLinear" in feeders:
        return "int8"
    if node.input[1] in half:
        return "fp16"
    return permitted


def cost_ms(node: Any, shapes: dict[str, tuple[int, ...]], kind: str) -> float:
    """Return overhead and arithmetic with channels rounded up to the block: a staircase over the width."""
    out, first = shapes.get(node.output[0], (1, 1)), shapes.get(node.input[0], (1, 1))
    into, onto = (math.ceil(max(each, 1) / BLOCK[kind]) * BLOCK[kind] for each in (first[1], out[1]))
    groups = next((each.i for each in node.attribute if each.name == "group"), 1)
    weight = shapes.get(node.input[1], (1, 1, 1, 1))
    pairs = math.prod(weight[2:]) * math.prod(out[2:])
    return 0.004 + into * onto * pairs / groups / MACS_PER_NS[kind] / 1e6


def layer_info(layers: list[dict[str, Any]], detailed: bool) -> str:
    if not detailed:
        return json.dumps({"Layers": [each["name"] for each in layers], "Bindings": ["x", "y"]})
    facts = [
        {"Name": each["name"], "Outputs": [{"Name": each["output"], "Format/Datatype": FORMAT[each["type"]]}]}
        for each in layers
    ]
    return json.dumps({"Layers": facts, "Bindings": ["x", "y"]})


def save(place: Path, header: dict[str, Any], content: bytes) -> None:
    words = json.dumps(header).encode()
    if CONFIG.get("fault") == "full":
        raise Stop("Saving engine to file failed: No space left on device")
    try:
        place.write_bytes(MAGIC + struct.pack("<I", len(words)) + words + content)
    except OSError as error:
        raise Stop(f"Saving engine to file failed: {error.strerror}") from error


# -- running --------------------------------------------------------------------------------------------------------


def load(name: str) -> dict[str, Any]:
    place = Path(name)
    if not place.is_file():
        raise Stop(f"Error opening engine file: {name}\nFailed to create engine from model or file.")
    content = place.read_bytes()
    if not content.startswith(MAGIC):
        raise Stop("Serialization assertion magicTagRead == kMAGIC_TAG failed.\nFailed to create engine from file.")
    start = len(MAGIC) + 4
    try:
        (length,) = struct.unpack_from("<I", content, len(MAGIC))
        header: dict[str, Any] = json.loads(content[start : start + length])
    except (struct.error, ValueError) as error:
        raise Stop("Engine deserialization failed") from error
    if header["number"] != versions.NUMBER[VERSION]:
        raise Stop(
            "6: The engine plan file is not compatible with this version of TensorRT, expecting library version "
            f"{VERSION} got {header['number']}, please rebuild."
        )
    say("I", "Engine deserialized in 0.0123 sec." if MAJOR >= 10 else "Engine loaded in 0.0123 sec.")
    return header | {"onnx": content[start + length :]}


def float32(value: float) -> float:
    """Return what is left of a number in the float32 that stamps are kept in."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def time_calls(options: dict[str, str], engine: dict[str, Any]) -> None:
    warm_up_ms, duration_s = float(options.get("warmUp", 200)), float(options.get("duration", 3))
    typical = sum(each["ms"] for each in engine["layers"]) * float(CONFIG.get("slow", 1.0))
    count = min(CALLS_CAP, max(int(options.get("iterations", 10)), math.ceil(duration_s * 1000 / typical)))
    noise, at, rows = random.Random(os.urandom(8)), 0.0, []
    say("I", "Starting inference")
    if CONFIG.get("realtime"):
        time.sleep(warm_up_ms / 1000 + duration_s)
    spread = 0.2 if CONFIG.get("fault") == "unstable" else NOISE
    for number in range(count):
        took = typical * (1 + abs(noise.gauss(0, spread)))
        took *= 1 + 0.3 * number / count if CONFIG.get("fault") == "throttle" else 1.0
        start, end = float32(at), float32(at + took)
        compute = max(end - start, 1e-6)
        rows.append(row(start, end, compute))
        at += took
    if CONFIG.get("fault") == "garbage":
        Path(options["exportTimes"]).write_text('[ { "computeMs" : nan } ]')
    elif "exportTimes" in options:
        Path(options["exportTimes"]).write_text("[\n  " + "\n, ".join(rows) + "\n]\n")
    computes = sorted(float(re.search(r'"computeMs" : ([^,]+)', each)[1]) for each in rows)  # type: ignore[index]
    report(computes, warm_up_ms, at / 1000, options)


def row(start: float, end: float, compute: float) -> str:
    begin = max(0.0, start - 0.02)
    facts = {
        "startEnqMs": begin,
        "endEnqMs": begin + 0.012,
        "startH2dMs": start,
        "endH2dMs": start,
        "startComputeMs": start,
        "endComputeMs": end,
        "startD2hMs": end,
        "endD2hMs": end,
        "h2dMs": 0,
        "computeMs": compute,
        "d2hMs": 0,
        "latencyMs": compute,
    }
    return "{ " + ", ".join(f'"{name}" : {value:g}' for name, value in facts.items()) + " }"


def report(computes: list[float], warm_up_ms: float, span_s: float, options: dict[str, str]) -> None:
    count = len(computes)
    say("I", f"Warmup completed {math.ceil(warm_up_ms / computes[0])} queries over {warm_up_ms:g} ms")
    say("I", f"Timing trace has {count} queries over {span_s:.6g} s")
    say("I", "")
    say("I", "=== Trace details ===")
    for place in range(min(count, 3)):
        say("I", f"Average on 1 runs - GPU latency: {computes[place]:g} ms - Host latency: {computes[place]:g} ms")
    if MAJOR >= 10 and count > 400:
        say("I", f"... Omitting {count - 400} lines")
    say("I", "=== Performance summary ===")
    say("I", f"Throughput: {1000 / (sum(computes) / count):g} qps")
    percents = [int(each) for each in options.get("percentile", "99").split(",")]
    for name, values in (("Latency", computes), ("Enqueue Time", [0.012] * count), ("H2D Latency", [0.0] * count),
                         ("GPU Compute Time", computes), ("D2H Latency", [0.0] * count)):  # fmt: skip
        say("I", f"{name}: {statistics(values, percents)}")
    say("I", f"Total Host Walltime: {span_s:g} s")
    say("I", f"Total GPU Compute Time: {sum(computes) / 1000:g} s")
    mean = sum(computes) / count
    spread = 100 * math.sqrt(sum((each - mean) ** 2 for each in computes) / count) / mean
    if spread > 2.5:
        say("W", f"* GPU compute time is unstable, with coefficient of variance = {spread:g}%.")


def statistics(values: list[float], percents: list[int]) -> str:
    count, ordered = len(values), sorted(values)
    facts = {"min": ordered[0], "max": ordered[-1], "mean": sum(values) / count, "median": ordered[count // 2]}
    facts |= {f"percentile({each}%)": ordered[count - 1 - int((1 - each / 100) * count)] for each in percents}
    return ", ".join(f"{name} = {value:g} ms" for name, value in facts.items())


def profile(options: dict[str, str], engine: dict[str, Any]) -> None:
    count = max(1, int(options.get("iterations", 10)))
    total = sum(each["ms"] for each in engine["layers"])
    rows = [f'{{ "count" : {count} }}']
    for each in engine["layers"]:
        facts = f'"timeMs" : {each["ms"] * count:g}, "averageMs" : {each["ms"]:g}, "medianMs" : {each["ms"]:g}'
        rows.append(f'{{ "name" : "{each["name"]}", {facts}, "percentage" : {100 * each["ms"] / total:.1f} }}')
    Path(options["exportProfile"]).write_text("[\n  " + "\n, ".join(rows) + "\n]\n")
    say("I", f"=== Profile ({count} iterations ) ===")
    for each in engine["layers"]:
        columns = (
            f"{each['ms'] * count:>10.2f} {each['ms']:>12.4f} {each['ms']:>12.4f} {100 * each['ms'] / total:>9.1f}"
        )
        late = (MAJOR, MINOR) >= (8, 6)
        say("I", f"{columns}   {each['name']}" if late else f"{each['name']:>40} {columns}")


def answer(options: dict[str, str], engine: dict[str, Any]) -> None:
    import numpy as np
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(engine["onnx"], settings, providers=["CPUExecutionProvider"])
    given = dict(re.findall(r"'([^']+)':([^,]+)", options["loadInputs"]))
    feeds, whole = {}, "<i8" if MAJOR >= 10 else "<i4"
    for each in session.get_inputs():
        kinds = {"tensor(float)": "<f4", "tensor(int64)": whole, "tensor(int32)": "<i4"}
        values = np.fromfile(given[each.name], kinds[each.type])
        if values.size != math.prod(each.shape):
            raise Stop(f"Note: loadInputs file size does not match the binding {each.name}")
        feeds[each.name] = values.reshape(each.shape).astype(np.int64 if each.type == "tensor(int64)" else values.dtype)
    names = [each.name for each in session.get_outputs()]
    outputs = dict(zip(names, session.run(names, feeds), strict=True))
    if "dumpRawBindingsToFile" in options:
        raw(outputs)
    if "exportOutput" in options:
        rows = [exported(name, value) for name, value in outputs.items()]
        Path(options["exportOutput"]).write_text("[\n  " + "\n, ".join(rows) + "\n]\n")


def raw(outputs: dict[str, Any]) -> None:
    words = {"float32": "Float", "float16": "Half", "int32": "Int32", "int64": "Int64", "bool": "Bool", "int8": "Int8"}
    for name, value in outputs.items():
        safe = "".join(each if each.isalnum() or each in "._-," else "_" for each in name)
        place = ".".join([safe, "output", *map(str, value.shape), words[value.dtype.name], "raw"])
        Path(place).write_bytes(value.tobytes()[:-1] if CONFIG.get("fault") == "torn" else value.tobytes())


def exported(name: str, value: Any) -> str:
    values = ", ".join(f"{each:g}" for each in value.ravel().tolist())
    sizes = ", ".join(map(str, value.shape))
    return f'{{ "name" : "{name}", "dimensions" : "({sizes})", "values" : [ {values} ] }}'


if __name__ == "__main__":
    sys.exit(main())
