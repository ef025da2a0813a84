"""Where a board is: ``ssh://[user@]host[:port]``, and nothing that a shell or ssh could read as anything else."""

import ipaddress
import re
from dataclasses import dataclass

from edgeprune.errors import ProfileError

_ADDRESS = re.compile(r"ssh://(?:(?P<user>[^@]*)@)?(?P<host>\[[^\[\]@]*\]|[^:@\[\]]*)(?::(?P<port>[^:@\[\]]*))?")
_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")
_USER = re.compile(r"[A-Za-z_][A-Za-z0-9._-]{0,31}")
_PORT = re.compile(r"[1-9][0-9]{0,4}")

EXAMPLE = "ssh://me@orin.local"


@dataclass(frozen=True, kw_only=True)
class Address:
    """A board: its host may be a name, an address or an alias of the user's ssh configuration."""

    host: str
    user: str | None = None
    port: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Return the address that `text` spells.

        Raises:
            ProfileError: if it is anything else, an option of ssh or a shell word among others.
        """
        found = _ADDRESS.fullmatch(text)
        if found is None:
            raise _refused(text, f"ssh://user@host or ssh://user@host:port is wanted, for example {EXAMPLE}")
        user, host, port = found["user"], found["host"], found["port"]
        if user is not None and not _USER.fullmatch(user):
            why = "a password has no place here; use a key" if ":" in user else "the user's name is none"
            raise _refused("ssh://...@..." if ":" in user else text, why)
        if port is not None and not (_PORT.fullmatch(port) and int(port) <= 65535):
            raise _refused(text, "the port is not a number from 1 to 65535")
        return cls(host=_host(text, host), user=user, port=int(port) if port else None)

    def __str__(self) -> str:
        user = f"{self.user}@" if self.user else ""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"ssh://{user}{host}{f':{self.port}' if self.port else ''}"

    @property
    def login(self) -> str:
        """Return the words that a person puts behind ``ssh`` to log in."""
        port = f"-p {self.port} " if self.port else ""
        return f"{port}{self.user}@{self.host}" if self.user else f"{port}{self.host}"


def missing(name: str, why: str, example: str = EXAMPLE) -> ProfileError:
    """Return the error of a target that is reached through ssh and does not say where it is.

    Args:
        name: of the target.
        why: it needs an address.
        example: of one.
    """
    return ProfileError(
        f"target {name!r} has no address",
        why=why,
        next_step=f'put into edgeprune.toml, below [targets.{name}]: address = "{example}"',
    )


def _host(text: str, host: str) -> str:
    if not host.startswith("["):
        if not _HOST.fullmatch(host):
            raise _refused(text, "the host is neither a name nor an address")
        return host
    try:
        found = ipaddress.IPv6Address(host[1:-1])
    except ValueError as error:
        raise _refused(text, "what stands in brackets is no IPv6 address") from error
    if found.scope_id is not None:
        raise _refused(text, "an address with a zone belongs into ~/.ssh/config, as HostName of an alias")
    return str(found)


def _refused(text: str, why: str) -> ProfileError:
    shown = "".join(filter(str.isprintable, text))[:120]
    next_step = f"put the board's address into the target's table of edgeprune.toml: address = \"{EXAMPLE}\""
    return ProfileError(f"{shown!r} is no address of a board", why=why, next_step=next_step)
