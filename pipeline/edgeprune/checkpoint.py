"""A checkpoint: tensors and a few facts in one safetensors file that is whole or is refused."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from edgeprune.durable import replacing, storage_errors
from edgeprune.errors import ConfigError, CorruptArtifact
from edgeprune.intake.weights import state_sha256

FORMAT = "edgeprune checkpoint 1"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a run needs to go on.

    Attributes:
        identity: SHA-256 of everything that the run's result depends on.
        facts: JSON values.
        tensors: by name.
    """

    identity: str
    facts: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def write(self, path: Path) -> None:
        """Put the checkpoint at `path`; a crash leaves the one that was there.

        Raises:
            StorageFull: if there is no room.
            ConfigError: if the folder cannot be written.
        """
        facts = json.dumps(self.facts)
        tensors = {name: each.detach().contiguous().clone() for name, each in self.tensors.items()}
        seal = _seal(self.identity, facts, tensors)
        header = {"format": FORMAT, "identity": self.identity, "facts": facts, "seal": seal}
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as stream:
                stream.write(save(tensors, metadata=header))

    @classmethod
    def read(cls, path: Path, identity: str) -> "Checkpoint":
        """Return the checkpoint at `path`.

        Raises:
            CorruptArtifact: if a bit of it changed.
            ConfigError: if it belongs to a run of another identity.
        """
        try:
            with safe_open(path, framework="pt") as opened:
                header: dict[str, str] = opened.metadata() or {}
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # not a mapping
        except (SafetensorError, OSError) as error:
            raise _corrupt(path, str(error)) from error
        found, facts = header.get("identity", ""), header.get("facts", "")
        if header.get("format") != FORMAT or header.get("seal") != _seal(found, facts, tensors):
            raise _corrupt(path, "it is not what was written")
        if found != identity:
            raise ConfigError(
                f"checkpoint {path} belongs to another run",
                why="its model, data or settings are not these",
                next_step="remove it, or use another run folder",
            )
        return cls(identity=found, facts=json.loads(facts), tensors=tensors)


def _seal(identity: str, facts: str, tensors: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(f"{identity} {facts} {state_sha256(tensors)}".encode()).hexdigest()


def _corrupt(path: Path, why: str) -> CorruptArtifact:
    return CorruptArtifact(f"checkpoint {path} cannot be read", why=why, next_step="remove it and start again")
