"""A Jetson over ssh, driven against a real OpenSSH server and the replay of its programs."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from contract import TargetContract
from loopback_sshd import INSTALL, sshd_path
from replay_board import ReplayBoard

from edgeprune.artifact import Artifact
from edgeprune.profile import Profile

pytestmark = pytest.mark.skipif(sshd_path() is None, reason=f"no OpenSSH server here; {INSTALL}")


class TestTensorrtSshContract(TargetContract):
    @pytest.fixture(scope="class")
    @classmethod
    def profile(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Profile]:
        with ReplayBoard(tmp_path_factory.mktemp("board")) as board:
            yield board.profile()

    def test_it_can_be_opened_again_after_it_was_left(self, tmp_path: Path, small: Artifact) -> None:
        """On a board of its own: the contract's target holds the other one's lock meanwhile."""
        with ReplayBoard(tmp_path / "other") as board:
            super().test_it_can_be_opened_again_after_it_was_left(board.profile(), small)
