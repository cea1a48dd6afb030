"""What a program and everything below it did, as `strace` saw it: connections, and files opened for writing.

strace prints `PID CALL(ARGUMENTS) = RESULT`; a call that another thread interrupts comes in two pieces, which are put
together again. Failed calls count for nothing, except connections: a name server that did not answer was still asked.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CALLS = (
    *("connect", "sendto", "sendmsg", "sendmmsg", "open", "openat", "openat2", "creat", "mkdir", "mkdirat"),
    *("rename", "renameat", "renameat2", "link", "linkat", "symlink", "symlinkat", "mknod", "mknodat"),
)
NETWORK = frozenset({"connect", "sendto", "sendmsg", "sendmmsg"})

_LINE = re.compile(r"^(\d+) +(\w+)\((.*)$")
_RESUMED = re.compile(r"^(\d+) +<\.\.\. (\w+) resumed>(.*)$")
_UNFINISHED = " <unfinished ...>"
_ADDRESS = re.compile(r'inet_addr\("([^"]+)"\)|inet_pton\(AF_INET6, "([^"]+)"')
_WRITING = re.compile(r"O_WRONLY|O_RDWR|O_CREAT|O_TRUNC|O_APPEND")


@dataclass(frozen=True)
class Call:
    """One system call; `text` is its arguments and its result as printed."""

    name: str
    text: str


def command(output: Path) -> list[str]:
    """strace with what has to be in front of the program's own command line."""
    kinds = f"trace={','.join(CALLS)}"
    return ["strace", "-f", "-qq", "-s", "400", "--seccomp-bpf", "-e", kinds, "-e", "signal=none", "-o", str(output)]


def calls(path: Path) -> Iterator[Call]:
    """Every call of a trace, whole; one that never ended (its process was killed) as far as it was seen."""
    begun: dict[str, str] = {}
    with path.open(errors="replace") as lines:
        for raw in lines:
            line = raw.rstrip("\n")
            resumed = _RESUMED.match(line)
            if resumed:
                line = begun.pop(resumed[1], f"{resumed[1]} {resumed[2]}(") + resumed[3]
            elif line.endswith(_UNFINISHED):
                begun[line.split(None, 1)[0]] = line.removesuffix(_UNFINISHED)
                continue
            found = _LINE.match(line)
            if found:
                yield Call(found[2], found[3])
    for line in begun.values():
        found = _LINE.match(line)
        if found:
            yield Call(found[2], found[3])


def reached(call: Call) -> str | None:
    """The address that a call connects or sends to, when it is not on this machine; else None."""
    if call.name not in NETWORK:
        return None
    found = _ADDRESS.search(call.text)
    if found is None:
        return None  # AF_UNIX, netlink, or a socket that is connected already
    address = ipaddress.ip_address(found[1] or found[2])
    return None if address.is_loopback or address.is_unspecified else str(address)


def written(call: Call) -> str | None:
    """The path that a call creates or opens for writing; else None. Of a rename or a link: the new name."""
    if call.name in NETWORK or re.search(r"\) += -1 E", call.text):
        return None
    if call.name.startswith("open") and not _WRITING.search(call.text):
        return None
    names: list[str] = re.findall(r'"((?:[^"\\]|\\.)*)"', call.text)
    return names[-1] if names else None
