"""Whether anything would still be heard of a channel group whose units make nothing but zeros.

conv1 ─ bn1 ─ relu ─ conv2      zeros in bn1 are enough: relu makes zeros of zeros, conv2 hears nothing
linear ─ sigmoid ─ linear       zeros in the first layer are 1/2 in the second one's input
"""

from collections.abc import Collection, Sequence

from edgeprune.removal import Step
from edgeprune.structure import Structure


def listener(structure: Structure, group: str, silenced: Collection[str]) -> str | None:
    """Return the first layer that hears the group's channels although some layers make zeros of them; None: no layer.

    Args:
        structure: of the model.
        group: name of the channel group.
        silenced: layers whose output is zero in the group's channels, whatever they read.
    """
    hearing = _Hearing(structure, group, silenced)
    for step in structure.channels.steps:
        if hearing.ends_at(step):
            return step.layer or step.outputs[0]
    return None


class _Hearing:
    """The tensors, in the order of the graph, in which a group's channels are not zero."""

    def __init__(self, structure: Structure, group: str, silenced: Collection[str]) -> None:
        self._classes = set(structure.units[group])
        self._structure, self._silenced = structure, silenced
        self._loud: set[str] = set()
        self._depthwise = {each.name for each in structure.layers if each.kind == "depthwise"}

    def ends_at(self, step: Step) -> bool:
        """Take in one step; return True if it reads the channels and they are not zero."""
        heard = [name for name in step.inputs if name in self._loud]
        carrying = self._carry(step.inputs)
        made = self._carry(step.outputs)
        if heard and not made:
            return True
        if made and self._sounds(step, heard, carrying):
            self._loud.update(made)
        return bool(heard) and step.layer is not None and self._mixes(step.layer)

    def _sounds(self, step: Step, heard: list[str], carrying: list[str]) -> bool:
        if step.layer in self._silenced:
            return False
        if self._makes(step):
            return True
        if step.op == "Mul" and carrying:
            return len(heard) == len(carrying)
        return bool(heard) or not step.silent_of_zeros

    @staticmethod
    def _makes(step: Step) -> bool:
        """Return whether a step is a layer that makes channels of others: it sounds unless it is silenced."""
        return step.layer is not None and step.op in ("Conv", "ConvTranspose", "Gemm")

    def _mixes(self, layer: str) -> bool:
        """Return whether a layer makes other channels of the group's; a depthwise one passes them on."""
        into = self._structure.classes.get((layer, "in"), ())
        return layer not in self._depthwise and not self._classes.isdisjoint(int(each) for each in into)

    def _carry(self, names: Sequence[str]) -> list[str]:
        owners = self._structure.channels.owners
        return [name for name in names if name in owners and not self._classes.isdisjoint(owners[name].tolist())]
