"""Who holds an output folder: a process, by its command, user and machine, and whether it is still running."""

from __future__ import annotations

import getpass
import json
import os
import secrets
import shlex
import socket
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

import psutil

from latent_medi.core.errors import shortened


@dataclass(frozen=True)
class Owner:
    """Who writes a folder.

    Args:
        token: Unique to this lock.
        command: What it runs, as it would be typed.
        pid, user, uid, host: Of its process.
        machine: Distinguishes machines and containers that have the same name and process numbers.
        started: When its process began, in seconds since the machine started, or since 1970 if the system does not
            say.
        since: When it took the folder, in words.
    """

    token: str
    command: str
    pid: int
    user: str
    uid: int
    host: str
    machine: str
    started: float
    since: str

    @staticmethod
    def this_process() -> Owner:
        """This process, with a new token."""
        try:
            user = getpass.getuser()
        except (KeyError, OSError):  # a container's user without a name
            user = str(os.getuid())
        return Owner(
            token=secrets.token_hex(8),
            command=_command(),
            pid=os.getpid(),
            user=user,
            uid=os.getuid(),
            host=socket.gethostname(),
            machine=_machine(),
            started=_started(psutil.Process()),
            since=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        )

    @staticmethod
    def from_json(text: bytes) -> Owner | None:
        """The owner that a lock file names; ``None`` if it names none: its owner may have died while writing it."""
        types = {"str": str, "int": int, "float": float}
        try:
            values = json.loads(text)
            return Owner(**{f.name: types[str(f.type)](values[f.name]) for f in fields(Owner)})
        except (ValueError, TypeError, KeyError, RecursionError):
            return None

    def to_json(self) -> bytes:
        """The content of its lock file."""
        return json.dumps(asdict(self), ensure_ascii=False).encode()

    def __str__(self) -> str:
        return f"`{self.command}` (process {self.pid} of {self.user} on {self.host}, since {self.since})"

    def lives(self) -> bool | None:
        """Whether its process is running; ``None`` if this process cannot see that."""
        if (self.host, self.machine) != (socket.gethostname(), _machine()):
            return None
        try:
            process = psutil.Process(self.pid)
            # The same number later is another process.
            return process.status() != psutil.STATUS_ZOMBIE and abs(_started(process) - self.started) < 0.5
        except psutil.AccessDenied:
            return True
        except psutil.NoSuchProcess:
            # Some systems hide the processes of other users.
            return False if os.getuid() in (0, self.uid) else None


def _started(process: psutil.Process) -> float:
    """When a process began, in seconds since the machine started: setting the clock does not change that number. In
    seconds since 1970 if the system does not say."""
    try:
        stat = Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8", errors="replace")
        return int(stat.rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return float(process.create_time())


def _command() -> str:
    """What this process runs, as it would be typed."""
    name = Path(sys.argv[0] if sys.argv else "").name
    words = ["latent-medi" if name in ("cli.py", "__main__.py", "") else name, *sys.argv[1:]]
    return shortened(shlex.join(words), 200)


def _machine() -> str:
    """Distinguishes this machine and its process numbers from others of the same name; "" if unknown."""
    known = []
    with suppress(OSError):
        known.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        known.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(known)
