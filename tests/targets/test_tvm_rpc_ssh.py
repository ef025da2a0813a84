"""A board of its own behind a real OpenSSH server: the tunnel to its server, and what becomes of a link that is cut."""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from board_programs import HERE, server
from contract import convnet, quick
from loopback_sshd import INSTALL, LoopbackSshd, sshd_path
from test_tvm_rpc import NATIVE, children, gone, later
from test_tvm_rpc_bundle import ROWS, bundle_of

from edgeprune.artifact import Artifact
from edgeprune.errors import DeviceLost, ProfileError
from edgeprune.profile import Profile, load_profile
from edgeprune.target import examine_target, open_target
from edgeprune.targets.tvm_rpc import TvmRpc

pytest.importorskip("tvm", reason="pip install -e '.[tvm]'")
pytestmark = pytest.mark.skipif(sshd_path() is None, reason=f"no OpenSSH server here; {INSTALL}")


class Bench:
    """A board with its server, and ssh in front of it."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.ssh = stack.enter_context(LoopbackSshd(folder / "sshd"))
        self.port, self.server = stack.enter_context(server(folder / "uploads"))

    def profile(self, **changes: object) -> Profile:
        options = {"server_port": self.port, "cpu": NATIVE, "slow_limit": 20.0, "pin": 0, **self.ssh.files} | changes
        return load_profile("raspberry-pi-4", {"address": self.ssh.address, "arch": HERE, "options": options})


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with ExitStack() as stack:
        yield Bench(tmp_path_factory.mktemp("board"), stack)


@pytest.fixture
def net(tmp_path: Path) -> Artifact:
    return convnet(tmp_path / "net.onnx", (16, 16), side=12)


def test_a_board_is_measured_through_the_tunnel(bench: Bench, net: Artifact) -> None:
    with open_target(bench.profile()) as target:
        model = target.compile(net)
        seen = target.measure(model, quick(model))
        assert (seen.metric, seen.emulated) == ("latency_ns", False)
        assert seen.conditions["board"]["machine"] == HERE
        assert {"governor", "throttled", "temperatures_c"} <= set(seen.conditions["before"])


def test_a_link_that_is_cut_loses_the_device_frees_the_board_and_is_made_again(bench: Bench, net: Artifact) -> None:
    with open_target(bench.profile()) as target:
        model = target.compile(net)
        target.measure(model, quick(model))
        (session,) = children(bench.server.pid)
        with later(0.5, bench.ssh.cut), pytest.raises(DeviceLost):
            target.measure(model, quick(model, session_ms=20_000.0))
        assert gone(session, 5)
        assert target.measure(model, quick(model)).sessions


def test_leaving_closes_the_tunnel_and_frees_the_board(bench: Bench) -> None:
    with open_target(bench.profile()):
        assert bench.ssh.connections()
    end = time.monotonic() + 10
    while bench.ssh.connections() or children(bench.server.pid):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_board_without_the_server_says_how_to_install_it(bench: Bench) -> None:
    with pytest.raises(DeviceLost, match="no session") as caught, open_target(bench.profile(server_port=1)):
        pass
    assert "arm/install" in caught.value.next_step
    problems = [each for each in examine_target(bench.profile(server_port=1)) if each.severity == "problem"]
    assert "arm/install" in problems[0].mend


def test_a_host_key_that_is_not_known_is_the_users_turn(bench: Bench) -> None:
    bench.ssh.forget()
    try:
        with pytest.raises(ProfileError, match="host key"), open_target(bench.profile()):
            pass
    finally:
        bench.ssh.trust()


@pytest.mark.parametrize("place", ["ssh://-oProxyCommand=evil", "ssh://a b", "ssh://host;reboot", "ssh://"])
def test_an_address_that_could_mean_something_else_is_refused(place: str) -> None:
    with pytest.raises(ProfileError), open_target(load_profile("raspberry-pi-4", {"address": place})):
        pass


def test_the_bundles_runner_checks_itself_on_the_board_and_leaves_nothing(
    bench: Bench, net: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_target(bench.profile()) as target:
        assert isinstance(target, TvmRpc)
        model = target.compile(net)
        answers = [target.run(model, {"x": row[None]})["y"] for row in ROWS]
        bundle = bundle_of(tmp_path, target, net, answers)
        said = target.selftest(bundle, net, trusted=False)
        assert said.ok
        assert "4 recorded samples" in said.detail
    assert not list(Path("/tmp").glob("edgeprune-bundle-*"))
