"""Running statistics of a cut model's batch norms, re-estimated on images.

A cut model keeps the statistics of the channels it lost. On training images they are averaged anew (EagleEye, arXiv
2007.02491). Images of another kind, such as synthetic ones, have statistics of their own: there the model is looked at
beside the unpruned one, whose statistics on images of the right kind are known.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from edgeprune.coupling import BATCH_NORMS


def recalibrate(module: nn.Module, images: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> None:
    """Re-estimate the running statistics of a model's batch norms in place: averages over the images.

    Args:
        module: left in eval mode.
        images: batches, each of which counts by its images; a last one of a single image goes with the one before it.
        dtype: arithmetic of the passes.
    """
    norms = list(_tracking(module).values())
    if not norms or not images:
        return
    for norm in norms:
        norm.reset_running_stats()
    seen = 0
    with _watching(module), _arithmetic(dtype):
        for batch in _batches(images):
            seen += len(batch)
            for norm in norms:
                norm.momentum = len(batch) / seen
            module(batch)


def regress_statistics(
    module: nn.Module,
    images: Sequence[Tensor],
    unpruned: nn.Module,
    kept: Mapping[str, Tensor],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Carry the running statistics of the unpruned model over to a cut one in place, by regression on images.

    Both models see the images. x is what a channel of the unpruned model is there, y what it is in the cut one, m and
    v are means and variances over the images, μ and σ² the running statistics of x:

        b = cov(x, y) / v_x,    mean = m_y + b · (μ − m_x),    variance = v_y + b² · (σ² − v_x)

    A channel that cutting only scales and shifts is carried over exactly, whatever the images; one that has nothing to
    do any more with what it was gets averages over the images; a model of which nothing was cut keeps its statistics.
    The estimator is the regression estimator of survey sampling (Cochran, Sampling Techniques, ch. 7); using it here is
    ours. What it is worth is in docs/methods/synthetic.md.

    Args:
        module: cut, its running statistics those of the unpruned model; left in eval mode.
        images: as for `recalibrate`.
        unpruned: the unpruned model; only its count of batches seen changes.
        kept: batch norm of the cut model → the channels it kept, int64.
        dtype: arithmetic of the passes.
    """
    norms, whole = _tracking(module), _tracking(unpruned)
    if not norms or not images:
        return
    moments = {name: _Moments(_mean(norm)) for name, norm in norms.items()}
    with _watching(module), _watching(unpruned), _inputs(whole) as before, _inputs(norms) as after, _arithmetic(dtype):
        for norm in (*norms.values(), *whole.values()):
            norm.momentum = 0.0
        for batch in _batches(images):
            unpruned(batch)
            module(batch)
            for name, each in moments.items():
                for was, now in zip(before[name], after[name], strict=True):
                    each.add(was[:, kept[name]], now)
            before.clear()
            after.clear()
    for name, norm in norms.items():
        mean, variance = moments[name].regressed(_variance(norm))
        _mean(norm).copy_(mean)
        _variance(norm).copy_(variance)


def numbered(module: nn.Module) -> nn.Module:
    """Return a copy whose batch norms have the numbers of their channels for means: cut, it tells what was kept."""
    marked = copy.deepcopy(module)
    for norm in _tracking(marked).values():
        _mean(norm).copy_(torch.arange(norm.num_features))
    return marked


def numbers(module: nn.Module) -> dict[str, Tensor]:
    """Return batch norm → the channels it kept, int64, of a `numbered` model that was cut."""
    return {name: _mean(norm).long() for name, norm in _tracking(module).items()}


class _Moments:
    """Sums over images of what channels were and are: about a centre near both, so that float32 is enough."""

    def __init__(self, centre: Tensor) -> None:
        self._centre, self._count = centre.clone(), 0
        self._sums: Tensor = torch.zeros(len(centre), 2)
        self._products: Tensor = torch.zeros(len(centre), 2, 2)

    def add(self, before: Tensor, after: Tensor) -> None:
        """Take in maps [N, C, ...] of the unpruned and of the cut model."""
        rows = torch.stack([each.float().transpose(0, 1).flatten(1) for each in (before, after)], 1)
        rows -= self._centre[:, None, None]
        self._sums += rows.sum(-1)
        self._products += rows @ rows.transpose(1, 2)
        self._count += rows.shape[-1]

    def regressed(self, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance after the cut, the centre being the mean before it and `variance` that before it."""
        means = self._sums / self._count
        spread = self._products / self._count - means[:, :, None] * means[:, None, :]
        spread *= self._count / max(1, self._count - 1)  # running variances are unbiased
        was, both, now = spread[:, 0, 0], spread[:, 0, 1], spread[:, 1, 1]
        slope = torch.where(was > 0, both / was.clamp_min(torch.finfo(was.dtype).tiny), 0.0)
        mean = self._centre + means[:, 1] - slope * means[:, 0]
        return mean, (now + slope**2 * (variance - was)).clamp_min(0.0)


def _batches(images: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the batches, a last one of a single image with the one before it: it has no variance of its own."""
    if len(images) > 1 and len(images[-1]) == 1:
        return [*images[:-2], torch.cat([*images[-2:]])]
    return images


@contextmanager
def _watching(module: nn.Module) -> Iterator[None]:
    """Let batch norms alone look at their batches during the block; then all is in eval mode, with its own momenta."""
    norms = _tracking(module).values()
    momenta = [norm.momentum for norm in norms]
    module.eval()
    for norm in norms:
        norm.train()
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        module.eval()


@contextmanager
def _inputs(norms: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """Collect what layers read during the block: name → inputs, one for each time the layer was called."""
    seen: dict[str, list[Tensor]] = defaultdict(list)

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _layer, inputs: seen[name].append(inputs[0].clone())  # what follows may write into it

    handles = [norm.register_forward_pre_hook(hook(name)) for name, norm in norms.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _arithmetic(dtype: torch.dtype) -> Iterator[None]:
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        yield


def _tracking(module: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    """Return the batch norms that have running statistics, by name."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, BATCH_NORMS) and layer.track_running_stats
    }


def _mean(norm: nn.modules.batchnorm._BatchNorm) -> Tensor:
    assert norm.running_mean is not None
    return norm.running_mean


def _variance(norm: nn.modules.batchnorm._BatchNorm) -> Tensor:
    assert norm.running_var is not None
    return norm.running_var
