"""A board behind a real OpenSSH server on the loopback: commands, files, ports, and every way to lose it."""

import os
import shutil
import signal
import socket
import string
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from getpass import getuser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loopback_sshd import INSTALL, LoopbackSshd, sshd_path

from edgeprune.errors import DeviceLost, ProfileError, StorageFull
from edgeprune.targets import _ssh_job
from edgeprune.targets._ssh import Address, Ssh, remote_path
from edgeprune.targets._ssh_job import job_script, plain

needs_sshd = pytest.mark.skipif(sshd_path() is None, reason=f"no OpenSSH server here; {INSTALL}")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackSshd]:
    with LoopbackSshd(tmp_path_factory.mktemp("board")) as running:
        yield running


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[LoopbackSshd]:
    """A server that the test may hurt."""
    with LoopbackSshd(tmp_path / "board") as running:
        yield running


@pytest.fixture
def board(server: LoopbackSshd) -> Iterator[Ssh]:
    with open_to(server) as ssh:
        yield ssh


def open_to(server: LoopbackSshd) -> Ssh:
    return Ssh(Address.parse(server.address), server.files)


def gone(pid: int, within_s: float = 20.0) -> bool:
    """Return whether the process ends in time; one that is ended but not yet reaped counts."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state in "ZX":
            return True
        time.sleep(0.02)
    return False


def pid_in(file: Path, within_s: float = 20.0) -> int:
    end = time.monotonic() + within_s
    while not (file.exists() and file.read_text().endswith("\n")):
        assert time.monotonic() < end, f"nothing was written to {file}"
        time.sleep(0.02)
    return int(file.read_text())


def sleeper(file: Path) -> list[str]:
    """Return a job that writes down its process id and never ends."""
    return ["bash", "-c", 'echo $$ > "$1"; exec sleep 3600', "sleeper", str(file)]


# -- addresses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("ssh://orin.local", Address(host="orin.local")),
        ("ssh://me@orin.local", Address(host="orin.local", user="me")),
        ("ssh://me@192.168.55.1:2222", Address(host="192.168.55.1", user="me", port=2222)),
        ("ssh://me@[fe80::1]:22", Address(host="fe80::1", user="me", port=22)),
        ("ssh://my_alias", Address(host="my_alias")),
    ],
)
def test_an_address_is_read_and_spelled_alike(text: str, address: Address) -> None:
    assert Address.parse(text) == address
    assert Address.parse(str(address)) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        "orin.local",
        "ssh://",
        "ssh://me@",
        "ssh://-oProxyCommand=touch x",
        "ssh://-oProxyCommand=x@host",
        "ssh://me@-l",
        "ssh://me@host;reboot",
        "ssh://me@host/etc",
        "ssh://me@host:0",
        "ssh://me@host:65536",
        "ssh://me@host:22 -v",
        "ssh://me@host\n-v",
        "ssh://me@$(reboot)",
        "ssh://a@b@host",
        "ssh://me@[::1",
        "ssh://me@[::g]",
        "ssh://me@[fe80::1%eth0]",
        "http://host",
    ],
)
def test_what_is_no_address_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ProfileError, match=r"edgeprune\.toml.*ssh://me@orin\.local"):
        Address.parse(text)


def test_a_password_in_an_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(ProfileError, match="use a key") as caught:
        Address.parse("ssh://me:secret@host")
    assert "secret" not in str(caught.value)


@given(st.text(max_size=40) | st.from_regex(r"ssh://[^ ]{0,20}@?[^ ]{1,20}(:[^ ]{0,6})?", fullmatch=True))
def test_whatever_gets_through_holds_no_option_and_no_shell_word(text: str) -> None:
    try:
        address = Address.parse(text)
    except ProfileError:
        return
    safe = set(string.ascii_letters + string.digits + "._-:")
    for part in (address.host, address.user or "x"):
        assert part[0] not in "-:." or ":" in part
        assert set(part) <= safe
    assert address.port is None or 1 <= address.port <= 65535


# -- scripts and text -----------------------------------------------------------------------------------------------


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), min_size=1, max_size=4))
def test_arguments_arrive_as_they_are_whatever_they_hold(words: list[str]) -> None:
    """The script is what bash on a board gets; no argument can end its quotes."""
    script = job_script(["printf", "%s\\0", *words], nonce="n", limit_s=60, silence_s=60)
    with subprocess.Popen(["bash", "--norc", "-s"], stdin=-1, stdout=-1, stderr=subprocess.DEVNULL) as board:
        assert board.stdin
        assert board.stdout
        board.stdin.write(script)
        board.stdin.flush()  # and kept open: its end is the dead-man switch
        own = board.stdout.read().partition(b"EDGEPRUNE_OUT n\n")[2].partition(b"\nEDGEPRUNE_RC=0 n\n")[0]
    assert own == b"".join(each.encode() + b"\0" for each in words)


def test_a_nul_byte_is_no_argument() -> None:
    with pytest.raises(ProfileError, match="NUL"):
        job_script(["echo", "a\0b"], nonce="n", limit_s=1, silence_s=1)


@given(st.text())
def test_plain_text_has_no_control_characters(text: str) -> None:
    assert all(each.isprintable() or each in "\n\t" for each in plain(text))


def test_escape_sequences_vanish_whole() -> None:
    assert plain("\x1b[31mred\x1b[0m \x1b]0;title\x07ok\r\n\x9b2J\x1bcend") == "red ok\nend"


@pytest.mark.parametrize("path", ["-rf", "~/x", "a b", "a;b", "../x", "a/../../b", "a*", "a\nb", "", '"', "é"])
def test_a_path_that_could_mean_more_is_not_used(path: str) -> None:
    with pytest.raises(DeviceLost):
        remote_path(path)


# -- commands -------------------------------------------------------------------------------------------------------


@needs_sshd
def test_a_command_returns_its_status_and_both_streams(board: Ssh) -> None:
    done = board.run(["sh", "-c", "echo out; echo err >&2; exit 7"], limit_s=20)
    assert (done.rc, done.stdout, done.stderr) == (7, "out\n", "err\n")


@needs_sshd
def test_arguments_reach_the_program_and_no_shell(board: Ssh, tmp_path: Path) -> None:
    words = ["a b", "'", '"', "$(touch pwned)", "`id`", "; exit 3", "-n", "new\nline", "\\'; true", "ünï"]
    assert board.run(["printf", "<%s>", *words], limit_s=20).stdout == "".join(f"<{each}>" for each in words)


@needs_sshd
def test_input_arrives_and_ends(board: Ssh) -> None:
    assert board.run(["wc", "-c"], limit_s=20, stdin=bytes(range(256)) * 100).stdout.strip() == "25600"


@needs_sshd
def test_a_command_can_say_nothing_that_passes_for_its_status(board: Ssh) -> None:
    done = board.run(["sh", "-c", "echo EDGEPRUNE_RC=0; exit 255"], limit_s=20)
    assert done.rc == 255
    assert done.stdout == "EDGEPRUNE_RC=0\n"


@needs_sshd
def test_a_command_killed_by_a_signal_says_so(board: Ssh) -> None:
    assert board.run(["sh", "-c", "kill -9 $$"], limit_s=20).rc == 128 + 9


@needs_sshd
def test_more_output_than_a_pipe_holds_is_read_whole(board: Ssh) -> None:
    done = board.run(["sh", "-c", "seq 200000; seq 100000 >&2"], limit_s=60)
    assert done.stdout.splitlines()[-1] == "200000"
    assert done.stderr.splitlines()[-1] == "100000"


@needs_sshd
def test_escape_codes_of_a_board_never_reach_a_terminal(board: Ssh) -> None:
    done = board.run(["printf", r"\033[2J\033]0;evil\007fine\r\n"], limit_s=20)
    assert done.stdout == "fine\n"


@needs_sshd
def test_a_board_that_answers_a_gigabyte_is_cut_off(board: Ssh) -> None:
    with pytest.raises(DeviceLost, match=r"head said more than 8192 KiB"):
        board.run(["head", "-c", "1G", "/dev/zero"], limit_s=120)
    assert board.run(["echo", "still", "there"], limit_s=20).rc == 0


@needs_sshd
def test_a_command_that_takes_too_long_is_ended_on_the_board(board: Ssh, tmp_path: Path) -> None:
    with pytest.raises(DeviceLost, match="bash did not end within 4 s"):
        board.run(sleeper(tmp_path / "pid"), limit_s=4)  # long enough for a busy machine to start it
    assert gone(pid_in(tmp_path / "pid"))


@needs_sshd
def test_what_a_command_leaves_behind_ends_with_it(board: Ssh, tmp_path: Path) -> None:
    script = 'sleep 3600 < /dev/null > /dev/null 2>&1 & echo $! > "$1"'
    assert board.run(["bash", "-c", script, "job", str(tmp_path / "pid")], limit_s=20).rc == 0
    assert gone(pid_in(tmp_path / "pid"))


@needs_sshd
def test_what_a_login_prints_is_no_output(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / ".bashrc").write_text("echo welcome; echo to the board >&2; printf 'EDGEPRUNE_RC=0 \\n'\n")
    with LoopbackSshd(tmp_path / "board", {"HOME": str(home)}) as server, open_to(server) as board:
        done = board.run(["echo", "hello"], limit_s=20)
        assert (done.stdout, done.stderr) == ("hello\n", "")


@needs_sshd
def test_a_job_runs_until_it_is_closed(board: Ssh, tmp_path: Path) -> None:
    job = board.start(["bash", "-c", 'echo $$ > "$1"; echo UP; exec sleep 3600', "job", str(tmp_path / "pid")])
    assert job.wait_for("UP", 20)
    assert job.alive
    job.close()
    assert gone(pid_in(tmp_path / "pid"))
    assert not job.alive


@needs_sshd
def test_a_job_that_talks_for_ever_keeps_only_its_last_words(board: Ssh) -> None:
    job = board.start(["sh", "-c", "seq 300000; echo LAST; exec sleep 3600"], cap=4096)
    try:
        assert job.wait_for("LAST", 60)
        assert len(job.stdout) <= 4096
    finally:
        job.close()


# -- files ----------------------------------------------------------------------------------------------------------


@needs_sshd
def test_a_file_goes_to_the_board_and_back(board: Ssh, tmp_path: Path) -> None:
    content = os.urandom(300_000)
    here = tmp_path / "odd [name] *?'\".bin"
    here.write_bytes(content)
    board.put(here, f"{tmp_path}/there.bin", limit_s=60)
    board.get(f"{tmp_path}/there.bin", tmp_path / "back again.bin", cap=1 << 20, limit_s=60)
    assert (tmp_path / "back again.bin").read_bytes() == content
    assert not list(tmp_path.glob("*.part"))


@needs_sshd
def test_a_file_larger_than_it_may_be_is_not_fetched(board: Ssh, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(5000))
    with pytest.raises(DeviceLost, match=r"5000 bytes.*at most 4999"):
        board.get(f"{tmp_path}/large", tmp_path / "back", cap=4999, limit_s=60)
    assert not (tmp_path / "back").exists()


@needs_sshd
def test_a_file_that_grows_after_it_was_asked_about_cannot_fill_this_disk(tmp_path: Path) -> None:
    """A board that lies about a size: its `stat` says 10 bytes, its sftp sends a million."""
    tools, home = tmp_path / "bin", tmp_path / "home"
    tools.mkdir()
    home.mkdir()
    (tools / "stat").write_text("#!/bin/sh\necho 10\n")
    (tools / "stat").chmod(0o755)
    (tmp_path / "large").write_bytes(bytes(1_000_000))
    path = {"PATH": f"{tools}:/usr/bin:/bin", "HOME": str(home)}
    with (
        LoopbackSshd(tmp_path / "board", path) as server,
        open_to(server) as board,
        pytest.raises(DeviceLost, match="did not arrive whole"),
    ):
        board.get(f"{tmp_path}/large", tmp_path / "back", cap=1 << 20, limit_s=60)
    assert not (tmp_path / "back").exists()


@needs_sshd
def test_a_file_that_is_not_there_is_named(board: Ssh, tmp_path: Path) -> None:
    with pytest.raises(DeviceLost, match=r"nothing\.bin cannot be read"):
        board.get(f"{tmp_path}/nothing.bin", tmp_path / "back", cap=10, limit_s=60)


@needs_sshd
def test_a_folder_that_is_not_there_takes_no_file(board: Ssh, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(DeviceLost, match="file could not be written"):
        board.put(tmp_path / "file", f"{tmp_path}/none/file", limit_s=60)


@needs_sshd
def test_a_full_disk_of_a_board_is_storage_full(board: Ssh, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", disk], capture_output=True).returncode:
        pytest.skip("this machine allows no mount; run the tests as root to see a full disk")
    try:
        (tmp_path / "file").write_bytes(os.urandom(1 << 20))
        with pytest.raises(StorageFull, match=r"the disk of 127\.0\.0\.1 is full.*MiB are needed"):
            board.put(tmp_path / "file", f"{disk}/file", limit_s=60)
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


# -- ports ----------------------------------------------------------------------------------------------------------


@needs_sshd
def test_a_port_of_the_board_is_reached_through_the_connection(board: Ssh, server: LoopbackSshd) -> None:
    port = board.forward(server.port)
    with socket.create_connection(("127.0.0.1", port), timeout=20) as link:
        assert link.recv(8) == b"SSH-2.0-"
    board.stop_forwarding(port, server.port)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=20)


# -- refused --------------------------------------------------------------------------------------------------------


@needs_sshd
def test_an_unknown_host_key_is_never_accepted(own_server: LoopbackSshd) -> None:
    own_server.forget()
    with pytest.raises(ProfileError, match=r"host key of 127\.0\.0\.1 is not known") as caught:
        open_to(own_server).open()
    assert f"-p {own_server.port} {getuser()}@127.0.0.1" in caught.value.next_step
    assert "fingerprint" in caught.value.next_step
    assert Path(own_server.files["known_hosts"]).read_text() == ""


@needs_sshd
def test_a_changed_host_key_is_refused_with_the_command_that_mends_it(own_server: LoopbackSshd) -> None:
    own_server.new_host_key()
    with pytest.raises(ProfileError, match=r"host key of 127\.0\.0\.1 has changed") as caught:
        open_to(own_server).open()
    command = caught.value.next_step.partition("installed anew: ")[2].partition(",")[0]
    subprocess.run(command, shell=True, check=True, capture_output=True)
    with pytest.raises(ProfileError, match="is not known"):
        open_to(own_server).open()


@needs_sshd
def test_whom_the_board_does_not_know_is_told_how_to_get_in(own_server: LoopbackSshd) -> None:
    (own_server.folder / "authorized_keys").write_text("")
    with pytest.raises(ProfileError, match="does not let") as caught:
        open_to(own_server).open()
    assert caught.value.next_step == f"ssh-copy-id -p {own_server.port} {getuser()}@127.0.0.1"


@needs_sshd
def test_a_board_that_is_off_is_lost_and_not_a_mistake_of_the_user(own_server: LoopbackSshd) -> None:
    own_server.stop()
    with pytest.raises(DeviceLost, match=r"cannot be reached.*refused"):
        open_to(own_server).open()


@needs_sshd
def test_a_machine_that_answers_with_something_else_is_no_board() -> None:
    with socket.create_server(("127.0.0.1", 0)) as impostor:
        thread = threading.Thread(target=lambda: impostor.accept()[0].sendall(b"\x1b[2J" * 9000 + b"\n"), daemon=True)
        thread.start()
        with pytest.raises(DeviceLost, match="cannot be reached") as caught:
            Ssh(Address(host="127.0.0.1", port=impostor.getsockname()[1])).open()
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("path", ["nothing.pem", 'quo"te', "per%cent"])
def test_a_file_for_ssh_must_be_one(tmp_path: Path, path: str) -> None:
    with pytest.raises(ProfileError, match="option identity_file"):
        Ssh(Address(host="h"), {"identity_file": str(tmp_path / path)})


@needs_sshd
def test_the_users_own_configuration_holds_but_for_what_keeps_us_safe(server: LoopbackSshd, tmp_path: Path) -> None:
    """An alias works; a terminal, a command, a local command and a shared connection of the user's do not interfere."""
    config = tmp_path / "ssh config"
    config.write_text(
        f"Host bench\n  HostName 127.0.0.1\n  Port {server.port}\n  User {getuser()}\n"
        f"Host *\n  RequestTTY force\n  RemoteCommand echo no\n  ControlMaster auto\n  ControlPath {tmp_path}/%C\n"
        f"  PermitLocalCommand yes\n  LocalCommand touch {tmp_path}/pwned\n  StrictHostKeyChecking no\n"
    )
    with Ssh(Address(host="bench"), {**server.files, "config_file": str(config)}) as board:
        assert board.run(["echo", "hello"], limit_s=20).stdout == "hello\n"
    assert not (tmp_path / "pwned").exists()


# -- lost -----------------------------------------------------------------------------------------------------------


def test_the_dead_man_switch_lets_go_within_five_seconds() -> None:
    assert _ssh_job.SILENCE_S + _ssh_job.GRACE_S < 5
    assert 2 * _ssh_job.BEAT_S < _ssh_job.SILENCE_S


def _in_the_middle(board: Ssh, file: Path, act: "object") -> None:
    """Run a job that never ends and call `act` once it runs."""

    def wait_and_act() -> None:
        pid_in(file)
        act()  # type: ignore[operator]

    thread = threading.Thread(target=wait_and_act)
    thread.start()
    try:
        board.run(sleeper(file), limit_s=120)
    finally:
        thread.join()


@needs_sshd
def test_a_cut_link_is_a_lost_device_and_the_job_on_the_board_ends(own_server: LoopbackSshd, tmp_path: Path) -> None:
    with open_to(own_server) as board, pytest.raises(DeviceLost, match="was lost while running bash"):
        _in_the_middle(board, tmp_path / "pid", own_server.cut)
    assert gone(pid_in(tmp_path / "pid"))


@needs_sshd
def test_a_frozen_board_is_a_lost_device_and_the_job_on_it_ends(own_server: LoopbackSshd, tmp_path: Path) -> None:
    """Nothing closes the connection, as with a pulled cable: the board must notice the silence itself."""
    with open_to(own_server) as board, pytest.raises(DeviceLost, match="was lost while running bash"):
        _in_the_middle(board, tmp_path / "pid", own_server.freeze)
    assert gone(pid_in(tmp_path / "pid"))
    own_server.thaw()


@needs_sshd
def test_a_lost_connection_is_never_replaced_behind_our_back(own_server: LoopbackSshd) -> None:
    """Another connection would be without lock and without the identity of the board that was checked."""
    with open_to(own_server) as board:
        own_server.cut()
        for _ in range(3):
            with pytest.raises(DeviceLost, match="was lost"):
                board.run(["true"], limit_s=20)
        assert not board.alive
    with open_to(own_server) as board:
        assert board.run(["true"], limit_s=20).rc == 0


_CHILD = """
import sys, time
from edgeprune.targets._ssh import Address, Ssh
address, identity, known, config, file = sys.argv[1:]
board = Ssh(Address.parse(address), {"identity_file": identity, "known_hosts": known, "config_file": config})
board.open()
board.start(["bash", "-c", 'echo $$ > "$1"; exec sleep 3600', "job", file])
time.sleep(3600)
"""


@needs_sshd
def test_a_killed_host_process_leaves_nothing_running(own_server: LoopbackSshd, tmp_path: Path) -> None:
    words = [sys.executable, "-c", _CHILD, own_server.address, *own_server.files.values(), str(tmp_path / "pid")]
    child = subprocess.Popen(words, start_new_session=True)
    pid = pid_in(tmp_path / "pid", within_s=60)
    clients = [each for each in _processes() if str(own_server.port) in _words_of(each) and "ssh" in _words_of(each)]
    assert clients
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert gone(pid)
    assert all(gone(each) for each in clients)


def _processes() -> list[int]:
    return [int(each.name) for each in Path("/proc").iterdir() if each.name.isdigit()]


def _words_of(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return ""
    return " ".join(each.decode(errors="replace") for each in words) if words[0] in (b"ssh", b"sftp") else ""


@needs_sshd
def test_closing_leaves_no_process_and_no_file(server: LoopbackSshd, tmp_path: Path) -> None:
    before = set(server.connections())
    with open_to(server) as board:
        folder = board._folder
        board.start(sleeper(tmp_path / "pid"))
        job = pid_in(tmp_path / "pid")
        mine = set(server.connections()) - before
        assert mine
    assert gone(job)
    assert all(gone(each) for each in mine)
    assert folder is not None
    assert not folder.exists()


def test_without_ssh_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(ProfileError, match="apt-get install openssh-client"):
        Ssh(Address(host="h")).open()
