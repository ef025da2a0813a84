"""Accuracy and entropy of candidates, fast: cut, re-estimate batch norms, fold them, run in the CPU's best format.

A pruned network keeps the batch-norm statistics of the channels it lost; re-estimating them on a few training images
makes its accuracy before fine-tuning predict its accuracy after it (EagleEye, arXiv 2007.02491).
"""

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Literal, cast

import onnx
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from edgeprune import entropy
from edgeprune.agreement import fidelity
from edgeprune.coupling import BATCH_NORMS, CONVOLUTIONS
from edgeprune.cut import cut_module
from edgeprune.plan import Plan
from edgeprune.recalibration import numbered, numbers, recalibrate, regress_statistics
from edgeprune.structure import Structure
from edgeprune.trial import Quality

Batch = tuple[Tensor, Tensor]
FOLDING_PROBE = 4
"""Images on which folding the batch norms must change nothing."""

FOLDING_TOLERANCE = 1e-3
"""Largest difference that folding may make, relative to the largest logit."""

Statistics = Literal["kept", "averaged", "regressed"]
"""Of a candidate's batch norms: the unpruned model's; averages over the calibration images (`recalibrate`); or the
unpruned model's carried over, where those images are of another kind than it was trained on (`regress_statistics`)."""


class Evaluator:
    """Judges plans of one model on fixed images.

    Args:
        module: the unpruned model, eval mode, fp32; left as it is.
        structure: of that model.
        graph: its exported graph; says which batch norm follows which convolution.
        validation: labelled batches, [N, C, H, W] float32 and int64 [N].
        calibration: training images, [N, C, H, W] float32, for batch-norm statistics.
        entropy_images: how many calibration images the spatial entropy is taken over; 0: none.
        dtype: arithmetic of the accuracy pass; None: whichever is faster here, see `fastest_dtype`.
        judged_by: "labels": of the batches; "teacher": the unpruned model's answers to them in place of the labels;
            "synthetic": its logits, the images being synthetic.
        repair: plan → the module in its unpruned shapes, kept channels making up for those that will be cut.
        statistics: what the batch norms of candidates get, see `Statistics`.
    """

    def __init__(
        self,
        module: nn.Module,
        structure: Structure,
        graph: onnx.ModelProto,
        *,
        validation: Sequence[Batch],
        calibration: Sequence[Tensor],
        entropy_images: int = 8,
        dtype: torch.dtype | None = None,
        judged_by: str = "labels",
        repair: Callable[[Plan], nn.Module] | None = None,
        statistics: Statistics = "averaged",
    ) -> None:
        self._module, self._structure, self._judged_by, self._repair = module, structure, judged_by, repair
        self._statistics = statistics
        self._pairs = _foldable(module, convolution_batch_norms(graph), validation[0][0][:FOLDING_PROBE])
        self._calibration = [each.to(memory_format=_layout(each)) for each in calibration]
        self._probe = calibration[0][:entropy_images] if entropy_images and calibration else None
        self.dtype = dtype or fastest_dtype(lambda: folded(module, self._pairs), validation[0][0])
        self._validation = [(x.to(self.dtype, memory_format=_layout(x)), y) for x, y in validation]
        self._wanted = None if judged_by == "labels" else self._logits(folded(module, self._pairs))
        self._ranges = self._activation_ranges() if self._probe is not None else {}

    def quality(self, plan: Plan) -> Quality:
        """Return accuracy and entropy of the model cut by a plan, batch norms re-estimated, nothing trained."""
        return self.judge(self.candidate(plan))

    def candidate(self, plan: Plan) -> nn.Module:
        """Return the cut model, repaired and its batch norms re-estimated if that is wanted, fp32, eval mode."""
        module = cut_module(self._repair(plan) if self._repair else self._module, self._structure, plan)
        if plan != self._structure.space.full():
            self._re_estimate(module, plan)
        return module.eval()

    def _re_estimate(self, module: nn.Module, plan: Plan) -> None:
        """Give the batch norms of a module that was cut by a plan their statistics."""
        if self._statistics == "averaged":
            recalibrate(module, self._calibration, self.dtype)
        elif self._statistics == "regressed":
            unpruned, marked = self._copies
            kept = numbers(cut_module(marked, self._structure, plan))
            regress_statistics(module, self._calibration, unpruned, kept, self.dtype)

    @cached_property
    def _copies(self) -> tuple[nn.Module, nn.Module]:
        """The unpruned model to look at beside candidates, and once more, `numbered`."""
        return copy.deepcopy(self._module).eval(), numbered(self._module)

    def judge(self, module: nn.Module) -> Quality:
        """Return accuracy, or nearness to the unpruned model, and entropy of a (cut) model."""
        ready = folded(module, self._pairs)
        entropy_value = self._entropy(ready) if self._probe is not None else None
        logits = self._logits(ready)
        return Quality(
            accuracy=self._worth(logits), entropy=entropy_value, images=len(logits), judged_by=self._judged_by
        )

    def _worth(self, logits: Tensor) -> float:
        if self._wanted is None:
            return _right(logits, torch.cat([labels for _, labels in self._validation]))
        if self._judged_by == "teacher":
            return _right(logits, self._wanted.argmax(1))
        return fidelity(logits, self._wanted)

    @torch.inference_mode()
    def _logits(self, ready: nn.Module) -> Tensor:
        """Return the answers of a folded model to the validation images, N x classes, float32."""
        ready = ready.to(self.dtype)
        return torch.cat([ready(images).float() for images, _ in self._validation])

    @torch.inference_mode()
    def accuracy(self, module: nn.Module, batches: Iterable[Batch]) -> float:
        """Return top-1 of a (cut) model on other labelled batches, in float32: what is shipped is float32."""
        ready, right, images = folded(module, self._pairs), 0, 0
        for x, labels in batches:
            right += int((ready(x.to(memory_format=_layout(x))).argmax(1) == labels).sum())
            images += len(labels)
        return right / images

    def _activation_ranges(self) -> dict[str, tuple[float, float]]:
        ranges = {}
        for name, maps in self._activations(folded(self._module, self._pairs)):
            ranges[name] = (float(maps.min()), float(maps.max()))
        return ranges

    def _entropy(self, module: nn.Module) -> float:
        means = []
        for name, maps in self._activations(module):
            if maps.shape[1] and name in self._ranges:
                low, high = self._ranges[name]
                means.append(entropy.kept_mean(entropy.spatial_entropy(maps, low, high)))
        return entropy.network_entropy(means)

    def _activations(self, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Yield layer name → output maps of every convolution that has room for neighbours, [N, C, H, W]."""
        assert self._probe is not None
        with recorded(module, lambda layer: isinstance(layer, nn.Conv2d)) as seen, torch.inference_mode():
            module(self._probe)
        for name, maps in seen.items():
            if maps.dim() == 4 and min(maps.shape[2:]) > 1:
                yield name, maps


def _right(logits: Tensor, labels: Tensor) -> float:
    return int((logits.argmax(1) == labels).sum()) / len(labels)


def convolution_batch_norms(graph: onnx.ModelProto) -> dict[str, str]:
    """Return batch norm → the convolution whose only reader it is, as module paths; layers used twice are left out."""
    readers: dict[str, int] = {}
    for node in graph.graph.node:
        for name in node.input:
            readers[name] = readers.get(name, 0) + 1
    made_by = {node.output[0]: node for node in graph.graph.node if node.op_type == "Conv"}
    return {
        node.input[1].removesuffix(".weight"): made_by[node.input[0]].input[1].removesuffix(".weight")
        for node in graph.graph.node
        if node.op_type == "BatchNormalization"
        and node.input[0] in made_by
        and readers[node.input[0]] == readers[node.input[1]] == readers[made_by[node.input[0]].input[1]] == 1
    }


def _foldable(module: nn.Module, pairs: Mapping[str, str], images: Tensor) -> Mapping[str, str]:
    """Return the pairs if folding them leaves the answers as they are, else none.

    A forward method may read a convolution's weight without calling it; the graph does not show that.
    """
    with torch.inference_mode():
        before, after = module.eval()(images), folded(module, pairs)(images)
    return pairs if float((after - before).abs().max()) <= FOLDING_TOLERANCE * float(before.abs().max()) else {}


def folded(module: nn.Module, pairs: Mapping[str, str]) -> nn.Module:
    """Return a copy in eval mode with each batch norm folded into its convolution, channels last.

    Args:
        module: a (cut) model; pairs that are no longer a convolution and a batch norm are passed over.
        pairs: batch norm → convolution, module paths.
    """
    result = copy.deepcopy(module).eval()
    layers = dict(result.named_modules())
    for norm_name, convolution_name in pairs.items():
        norm, convolution = layers.get(norm_name), layers.get(convolution_name)
        if isinstance(norm, BATCH_NORMS) and isinstance(convolution, CONVOLUTIONS) and norm.running_mean is not None:
            convolution.weight, convolution.bias = _fused(convolution, norm)
            result.set_submodule(norm_name, nn.Identity())
    return cast(nn.Module, result.to(memory_format=torch.channels_last))  # type: ignore[call-overload]


def _fused(convolution: nn.Module, norm: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    assert isinstance(convolution, CONVOLUTIONS)
    assert isinstance(norm, BATCH_NORMS)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return fuse_conv_bn_weights(
        convolution.weight, convolution.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )


@contextmanager
def recorded(module: nn.Module, wanted: Callable[[nn.Module], bool]) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of the layers that are `wanted` during the block: name → last output."""
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda _layer, _inputs, output: seen.__setitem__(name, output)

    handles = [each.register_forward_hook(hook(name)) for name, each in module.named_modules() if wanted(each)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def fastest_dtype(make: Callable[[], nn.Module], images: Tensor, rounds: int = 2) -> torch.dtype:
    """Return bfloat16 where this CPU runs the model faster in it than in float32, timed once on a few images."""
    best, seconds = torch.float32, float("inf")
    for dtype in (torch.float32, torch.bfloat16):
        module = make().to(dtype)
        x = images[:64].to(dtype, memory_format=_layout(images))
        with torch.inference_mode():
            module(x)
            took = min(_seconds(lambda m=module, x=x: m(x)) for _ in range(rounds))  # type: ignore[misc]
        if took < seconds:
            best, seconds = dtype, took
    return best


def _seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _layout(images: Tensor) -> torch.memory_format:
    return torch.channels_last if images.dim() == 4 else torch.contiguous_format
