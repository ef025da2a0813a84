"""The methods by name: presets of the search, and what each needs, optimises and comes from.

A method says how widths and channels are chosen and how weights make up for what is cut. It is a set of defaults of
``[search]``: a setting the user gives wins over it. Measuring, cutting, budget, ledger and proof are the same for all.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way of pruning.

    Attributes:
        title: its name in the literature.
        source: where it comes from, and whether it is as published or re-derived.
        idea: in one sentence.
        optimises: what a candidate is judged by, under the measured budget.
        needs: what must be there.
        presets: settings of ``[search]`` it stands for.
        page: of the documentation.
    """

    title: str
    source: str
    idea: str
    optimises: str
    needs: tuple[str, ...]
    presets: Mapping[str, Any] = field(default_factory=dict)
    page: str


METHODS: Mapping[str, Method] = {
    "amc": Method(
        title="AMC with measured latency",
        source="arXiv 1802.03494, with measured latency in place of FLOPs; clip and reward re-derived",
        idea="an agent decides group after group how much to keep; importance decides which channels",
        optimises="validation accuracy before fine-tuning, a little spatial entropy",
        needs=("labelled images",),
        page="docs/methods/amc.md",
    ),
    "entropy-rl": Method(
        title="Entropy-driven pruning",
        source="after arXiv 2312.04918, re-derived: estimator, ranges and budget are ours",
        idea="the same agent, rewarded for orderly activations instead of right answers",
        optimises="spatial entropy of activations, to be made small at the latency of the budget; accuracy is watched",
        needs=("images, synthetic ones with --data-free", "convolutions with maps of more than one pixel"),
        presets={"reward": {"accuracy": 0.0, "entropy": 1.0, "unused": 5.0}},
        page="docs/methods/entropy-rl.md",
    ),
    "autodfp": Method(
        title="AutoDFP",
        source="after arXiv 2403.08204, re-derived: state, clustering and reconstruction are ours",
        idea="an agent decides for each group how much to keep and how the kept channels make up for the rest",
        optimises="agreement with the unpruned model on unlabelled images, or, with --data-free, on synthetic ones",
        needs=("unlabelled images, or none with --data-free",),
        presets={
            "strategy": "sac",
            "importance": "group-norm",
            "reconstruction": "local-ridge",
            "repairs": True,
            "judged_by": "teacher",
            "reward": {"entropy": 0.0},
        },
        page="docs/methods/autodfp.md",
    ),
    "paoding": Method(
        title="PAODING",
        source="arXiv 2405.00074 and 2204.00783, from its public code, with its bounds made sound",
        idea="small steps remove the weakest filters and merge the dense units whose merging moves the output least",
        optimises="the impact of each step on the output's intervals; the walk stops when the measured latency fits",
        needs=(
            "unlabelled images, or none with --data-free: the walk itself reads weights alone",
            "pairs of dense layers, or convolutions",
        ),
        presets={
            "strategy": "walk",
            "importance": "paoding",
            "reconstruction": "pairs",
            "judged_by": "teacher",
            "reward": {"entropy": 0.0},
        },
        page="docs/methods/paoding.md",
    ),
}

DEFAULT = "amc"

FINETUNING: Mapping[str, Method] = {
    "one-step": Method(
        title="cut, then train",
        source="common practice",
        idea="what goes is cut at once, and the smaller model is trained",
        optimises="answers of the unpruned model and labels",
        needs=("training images, labelled or not",),
        page="docs/configuration.md",
    ),
    "decay": Method(
        title="Decay Pruning Method",
        source="arXiv 2406.03879; its formula of decay, its rectification re-derived; hosts 2301.12900, 1909.08174, "
        "2303.06862",
        idea="what goes shrinks to nothing while the model learns, and is released if its gradients resist",
        optimises="the same, with the widths of the plan or those worth most per millisecond",
        needs=(
            "training images, labelled or not",
            "host gates: batch norms after what is cut",
            "host half-space: operations that leave zeros zero",
        ),
        page="docs/methods/decay.md",
    ),
}
"""How what is cut leaves the model when it is fine-tuned, beside any method; the first is the default."""

DATA_FREE: Mapping[str, Any] = {
    "judged_by": "synthetic",
    "importance": "group-norm",
    "reward": {"entropy": 0.0},
}
"""What ``data_free`` changes in a method's presets: nothing may look at an image."""


def presets(method: str, *, data_free: bool) -> dict[str, Any]:
    """Return the settings of ``[search]`` that a method stands for; empty for a name that is none."""
    known = METHODS.get(method)
    chosen = dict(known.presets) if known else {}
    for name, value in DATA_FREE.items() if data_free else ():
        own = chosen.get(name)
        if name == "importance" and own == "paoding":
            continue  # it is made from weights alone
        chosen[name] = {**value, **own} if isinstance(value, Mapping) and isinstance(own, Mapping) else value
    return chosen
