"""One job per output folder: a lock file in the folder that names its owner.

The file is made complete under another name and then linked into place, which succeeds for exactly one of several
processes on local disks and on network ones alike. A dead owner's lock is taken over; whether the owner lives is seen
by its process on the same machine, and by the lock's time, which the owner renews, from another one.
"""

from __future__ import annotations

import errno
import getpass
import json
import os
import secrets
import shlex
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from latent_medi.core.errors import UserError
from latent_medi.core.files import cannot_write, check_output
from latent_medi.core.progress import duration, get_logger

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = get_logger("locks")

LOCK_FILE = ".latent-medi.lock"
"""Name of the lock in a folder that is being written."""
HEARTBEAT = 20.0
"""Seconds after which an owner renews its lock's time."""
STALE_AFTER = 300.0
"""Seconds without a renewal after which the lock of an owner on another machine is taken over."""

_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES})
_MOST_BYTES = 65536
_held: dict[tuple[int, str], _Held] = {}  # by process and lock file: a step may use the folder of the run it is in


@dataclass(frozen=True)
class Owner:
    """Who writes a folder.

    Args:
        token: Unique to this lock.
        command: What it runs, as it would be typed.
        pid, user, uid, host: Of its process.
        machine: What tells apart machines (and containers) that have the same name and process numbers.
        started: When its process began, in seconds since the machine started, or since 1970 where that is not told.
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
            secrets.token_hex(8), _command(), os.getpid(), user, os.getuid(), socket.gethostname(), _machine(),
            _started(psutil.Process()), datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        )  # fmt: skip

    def told(self) -> str:
        """The owner in words."""
        return f"`{self.command}` (process {self.pid} of {self.user} on {self.host}, since {self.since})"

    def lives(self) -> bool | None:
        """Whether its process is there; ``None`` if that cannot be seen from here."""
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
    """When a process began. Since the machine's start, where it is told: clocks are set, and then processes would seem
    to be others."""
    try:
        told = Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8", errors="replace")
        return int(told.rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return process.create_time()


@dataclass
class _Held:
    path: Path
    token: str
    ended: threading.Event
    depth: int = 1


@contextmanager
def output_lock(folder: str | Path, accelerator: Accelerator | None = None, *, beside: bool = False) -> Iterator[None]:
    """Hold an output folder while a job writes it; made if it is not there, and removed again if nothing was written.

    A process may hold a folder several times, so a step can write the folder of the run that it belongs to.

    Args:
        folder: The folder.
        accelerator: Of several launched processes, all of which must call; the first one holds the folder, and a
            refusal ends all.
        beside: The folder is written under another name and renamed, so the lock lies beside it.

    Raises:
        UserError: Another job writes the folder (it is named), or the folder cannot be written.
    """
    folder = Path(folder)
    if accelerator is None or accelerator.num_processes == 1:
        with _lock(folder, beside):
            yield
        return
    from accelerate.utils import broadcast_object_list

    holding, failure = _lock(folder, beside), None
    if accelerator.process_index == 0:
        try:
            holding.__enter__()
        except Exception as error:  # whatever it is, the others must not wait
            failure = error
    told = broadcast_object_list([None if failure is None else str(failure)])[0]
    if failure is not None:
        raise failure
    if told is not None:
        raise UserError(told)
    try:
        yield
    finally:
        if accelerator.process_index == 0:
            holding.__exit__(None, None, None)


@contextmanager
def _lock(folder: Path, beside: bool) -> Iterator[None]:
    check_output(folder, folder=True)
    folder = folder.resolve()
    home = folder.parent if beside else folder
    path = home / (f".{folder.name}{LOCK_FILE}" if beside else LOCK_FILE)
    made = _make(home)
    key = (os.getpid(), str(path))
    if key in _held:
        _held[key].depth += 1
        held = _held[key]
    else:
        try:
            held = _Held(path, _take(path, folder), threading.Event())
        except BaseException:
            _remove_empty(made)
            raise
        _held[key] = held
        threading.Thread(target=_renew, args=(held, folder), name="folder lock", daemon=True).start()
    try:
        yield
    finally:
        held.depth -= 1
        if not held.depth and key[0] == os.getpid():  # not in a fork of the process that holds it
            held.ended.set()
            del _held[key]
            with suppress(OSError, UserError):
                if _token(path) == held.token:
                    path.unlink()
            _remove_empty(made)


def _make(folder: Path) -> list[Path]:
    """Make a folder; returns what was made, innermost first."""
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from None
    return absent


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders that a job made and left empty."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _take(path: Path, folder: Path) -> str:
    """Make a lock, or take over a dead owner's; returns its token.

    Whoever takes over first makes a claim, a file named by the token of the lock that it replaces: it can be made once
    only, whoever has it is alone in replacing that lock, and if it dies there, its claim can be claimed in turn.
    """
    owner = Owner.this_process()
    own = path.with_name(f"{path.name}-{owner.token}")
    content = json.dumps(asdict(owner), ensure_ascii=False).encode()
    try:
        while True:
            _write(own, content)
            if _link(own, path, content):
                break
            ended = _ended(path, folder, own)
            if not ended or not _link(own, _claim(path, ended[-1]), content):
                continue  # it was released meanwhile, or somebody else claims it: look again
            if _chain(path)[: len(ended) + 1] == [*ended, owner.token]:
                _write(own, content)
                os.replace(own, path)
                logger.info("%s was left by a job that has ended; taken over.", folder)
                break
            _claim(path, ended[-1]).unlink(missing_ok=True)  # it was taken over while we looked
        for leftover in path.parent.glob(f"{path.name}-*"):  # of processes that died, or that will look again
            leftover.unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from None
    finally:
        with suppress(OSError):
            own.unlink(missing_ok=True)
    return owner.token


def _write(own: Path, content: bytes) -> None:
    with suppress(FileExistsError):
        handle = os.open(own, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with os.fdopen(handle, "wb") as file:
            file.write(content)


def _link(own: Path, path: Path, content: bytes) -> bool:
    """Put a complete file at ``path`` unless there is one."""
    try:
        os.link(own, path)
        return True
    except FileExistsError:
        # A network file system may have linked and lost its answer.
        with suppress(OSError):
            return own.samefile(path)
        return False
    except FileNotFoundError:  # cleared away by whoever took the lock
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    try:  # a file system without links
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return False
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    return True


def _claim(path: Path, token: str) -> Path:
    return path.with_name(f"{path.name}-after-{token}")


def _read(path: Path) -> tuple[Owner | None, os.stat_result] | None:
    """The owner that a lock names (``None`` if it names none) and the file's state; ``None`` if there is no lock."""
    try:
        # Opened each time, since network file systems then ask their server for the file's time.
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise UserError(f"{path} is a link, no lock of this program.", "Remove it.") from None
    try:
        state = os.fstat(handle)
        if not stat.S_ISREG(state.st_mode):
            raise UserError(f"{path} is no lock of this program.", "Move it away.")
        text = os.read(handle, _MOST_BYTES)
    finally:
        os.close(handle)
    try:
        values = json.loads(text)
        return Owner(**{f.name: _TYPES[str(f.type)](values[f.name]) for f in fields(Owner)}), state
    except (ValueError, TypeError, KeyError, RecursionError):
        return None, state  # on a file system without links, its owner may have died while writing it


_TYPES = {"str": str, "int": int, "float": float}


def _token(path: Path) -> str:
    """The token of the lock at ``path``; "" if there is none."""
    found = _read(path)
    if found is None:
        return ""
    owner, state = found
    return owner.token if owner else f"unreadable-{state.st_ino}-{state.st_mtime_ns}"


def _chain(path: Path) -> list[str]:
    """Tokens of the lock, of the claim to take it over, of the claim to that one, and so on."""
    tokens: list[str] = []
    file = path
    while (token := _token(file)) and token not in tokens:
        tokens.append(token)
        file = _claim(path, token)
    return tokens


def _ended(path: Path, folder: Path, own: Path) -> list[str]:
    """The chain of tokens at ``path`` if all of their owners ended; nothing if the lock is gone.

    Raises:
        UserError: An owner lives.
    """
    chain = _chain(path)
    for at, token in enumerate(chain):
        file = path if at == 0 else _claim(path, chain[at - 1])
        found = _read(file)
        if found is None:
            return []
        owner, _ = found
        lives = owner.lives() if owner else None
        if lives is None:
            lives = _renewed(file, token, owner, folder, own)
        if lives:
            raise _refusal(folder, path, owner)
        if lives is None:
            return []
    return chain


def _renewed(file: Path, token: str, owner: Owner | None, folder: Path, own: Path) -> bool | None:
    """Watch a lock of an owner that cannot be seen: whether it renews it; ``None`` if the lock is gone."""
    begun, first, told = time.monotonic(), None, False
    while True:
        found = _read(file)
        if found is None or _token(file) != token:
            return None
        time_of = found[1].st_mtime_ns
        if first is not None and time_of != first:
            return True
        first = time_of
        # Both times are the file server's, so clocks of machines that differ do no harm.
        os.utime(own)
        age = max(time.monotonic() - begun, own.stat().st_mtime - time_of / 1e9)
        if age >= STALE_AFTER:
            return False
        if not told:
            logger.info(
                "%s may be being written by %s; waiting for a sign of life, %s at most.",
                folder, owner.told() if owner else "another job", duration(STALE_AFTER - age),
            )  # fmt: skip
            told = True
        time.sleep(min(1.0, HEARTBEAT / 4))


def _refusal(folder: Path, path: Path, owner: Owner | None) -> UserError:
    return UserError(
        f"{folder} is being written by {owner.told() if owner else 'another job'}.",
        f"Wait until it has ended, or give another folder. If there is no such job any more, remove {path}.",
    )


def _renew(held: _Held, folder: Path) -> None:
    """Renew a lock's time until it is released; ends the program if somebody else has taken the folder."""
    while not held.ended.wait(HEARTBEAT):
        try:
            token = _token(held.path)
            if token == held.token:
                os.utime(held.path)
                continue
        except (OSError, UserError):  # a server that is out of reach for a while
            continue
        if held.ended.is_set() or not token:  # removed by hand; nobody else writes
            continue
        logger.error("%s was taken over by another job, as this one gave no sign of life; it ends here.", folder)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)  # wakes it, too
        if not held.ended.wait(HEARTBEAT):  # a job of the background may ignore it
            os._exit(130)


def _command() -> str:
    """What this process runs, as it would be typed."""
    name = Path(sys.argv[0] if sys.argv else "").name
    words = ["latent-medi" if name in ("cli.py", "__main__.py", "") else name, *sys.argv[1:]]
    text = shlex.join(words)
    return text if len(text) <= 200 else f"{text[:199]}…"


def _machine() -> str:
    """What tells this machine and its set of process numbers from others of the same name; "" where unknown."""
    known = []
    with suppress(OSError):
        known.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        known.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(known)
