"""What PAODING costs: the pairs of one layer of 512 units, and whole walks.

    python benchmarks/paoding.py [--units 512] [--repeats 3] [--out FILE.json]

The network is 784-512-512-10 with random weights, the layer its first, so that the impact of every pair goes through
another layer of 512. All ordered pairs are 261,632; a walk judges only some of them. Beside it the same impacts one
pair after the other, with the same kernels, on a few hundred pairs: what not vectorising would cost.

Seconds are of processor time, on one thread: other work on the machine does not count.

The aim: the saliency of all pairs and the impact of all pairs in seconds, at most 10 together.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np
import raw_results

from edgeprune.paoding import pairs
from edgeprune.paoding.intervals import Bounds
from edgeprune.paoding.network import Chain, Dense, Network
from edgeprune.paoding.propagation import Propagation
from edgeprune.paoding.walk import Settings, walk

BAR_S = 10.0
ONE_BY_ONE = 300


def chain_of(units: int, seed: int = 0) -> Chain:
    """Return 784-units-units-10 with ReLU, weights as PyTorch draws them, over pixels in [0, 1]."""
    rng = np.random.default_rng(seed)
    layers = []
    for place, (into, out) in enumerate(((784, units), (units, units), (units, 10))):
        reach, inside = into**-0.5, place < 2
        layers.append(
            Dense(
                name=f"fc{place}",
                weight=rng.uniform(-reach, reach, (out, into)),
                bias=rng.uniform(-reach, reach, out),
                activation="relu" if inside else "identity",
                group=f"fc{place}" if inside else None,
                rows=np.arange(out if inside else 0),
            )
        )
    return Chain(layers=tuple(layers), box=Bounds(low=np.zeros(784), high=np.ones(784)), box_source="pixels")


def seconds(work: Callable[[], object]) -> float:
    """Return the processor time of a call."""
    began = time.process_time()
    work()
    return time.process_time() - began


def main() -> None:
    """Print and write medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    chain = chain_of(chosen.units)
    network = Network(
        scale={f"fc{place}": np.abs(chain.layers[place].weight).mean(1) for place in range(2)},
        chains=(chain,),
        obstacles={},
    )
    first, second = chain.layers[:2]
    propagation = Propagation(chain)
    keep, drop = (each[~np.eye(chosen.units, dtype=bool)] for each in np.indices((chosen.units, chosen.units)))
    few = np.random.default_rng(1).choice(len(keep), ONE_BY_ONE, replace=False)
    work: dict[str, Callable[[], object]] = {
        "saliency of all pairs": lambda: pairs.saliency(first.weight, second.weight.T, first.bias),
        "impact and score of all pairs": lambda: pairs.score(
            propagation.impacts(propagation.untouched(), 0, keep, drop), 0.75, "log1p"
        ),
        f"impact of {ONE_BY_ONE} pairs, one by one": lambda: [
            propagation.impacts(propagation.untouched(), 0, keep[[each]], drop[[each]]) for each in few
        ],
        **{f"walk, {mode}": lambda mode=mode: walk(network, Settings(mode=mode)) for mode in ("saliency", "impact")},
        "walk, stochastic": lambda: walk(network, Settings(mode="stochastic")),
    }
    taken: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(chosen.repeats):
        for name, each in work.items():
            taken[name].append(seconds(each))
    medians = {name: statistics.median(each) for name, each in taken.items()}
    for name, value in medians.items():
        print(f"{name:40s} {value:8.3f} s")
    one_by_one = medians[f"impact of {ONE_BY_ONE} pairs, one by one"] / ONE_BY_ONE * len(keep)
    at_once = medians["impact and score of all pairs"]
    together = at_once + medians["saliency of all pairs"]
    print(
        f"{len(keep)} pairs: {together:.2f} s at once; one by one {one_by_one:.0f} s, {one_by_one / at_once:.0f} times"
    )
    facts = {"units": chosen.units, "pairs": len(keep), "seconds": taken, "one_by_one_s": one_by_one}
    raw_results.keep(chosen.out, {**raw_results.about(), **facts})
    raise SystemExit(int(chosen.units == 512 and together > BAR_S))


if __name__ == "__main__":
    main()
