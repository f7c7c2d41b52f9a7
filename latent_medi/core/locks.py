"""One job per output folder: a lock file in the folder names the process that writes it.

A process writes its lock file under another name and then links it into place. Of several processes exactly one
succeeds, on local and on network file systems. The lock of a process that has ended is taken over: on the same machine
the process list says whether it has; from another machine, the lock's time, which its owner renews.
"""

from __future__ import annotations

import errno
import os
import signal
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from latent_medi.core.errors import UserError
from latent_medi.core.files import cannot_write, check_output
from latent_medi.core.lock_owner import Owner
from latent_medi.core.progress import duration, get_logger

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = get_logger("locks")

LOCK_FILE = ".latent-medi.lock"
"""Name of the lock in a folder that is being written."""
HEARTBEAT = 20.0
"""Seconds between an owner's renewals of its lock's time."""
STALE_AFTER = 300.0
"""Seconds without a renewal after which the lock of an owner on another machine is taken over."""

_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES})
_MOST_BYTES = 65536
_held: dict[tuple[int, str], _Held] = {}  # by process and lock file: a step may use the folder of the run it is in


@dataclass
class _Held:
    path: Path
    token: str
    ended: threading.Event
    depth: int = 1


@contextmanager
def output_lock(folder: str | Path, accelerator: Accelerator | None = None, *, next_to: bool = False) -> Iterator[None]:
    """Hold an output folder while a job writes it. A folder that did not exist is made, and removed if it stays empty.

    A process may hold a folder several times, so that a step can write into the folder of the run it belongs to.

    Args:
        folder: The folder.
        accelerator: Of several launched processes, all of which must call. The first one holds the folder; if it
            cannot, all raise the error.
        next_to: Put the lock next to the folder instead of into it, because the folder is written under another name
            and renamed.

    Raises:
        UserError: Another job writes the folder (it is named), or the folder cannot be written.
    """
    folder = Path(folder)
    if accelerator is None or accelerator.num_processes == 1:
        with _lock(folder, next_to):
            yield
        return
    from accelerate.utils import broadcast_object_list

    holding, failure = _lock(folder, next_to), None
    if accelerator.process_index == 0:
        try:
            holding.__enter__()
        except Exception as error:  # whatever it is, the others must not wait
            failure = error
    message = broadcast_object_list([None if failure is None else str(failure)])[0]
    if failure is not None:
        raise failure
    if message is not None:
        raise UserError(message)
    try:
        yield
    finally:
        if accelerator.process_index == 0:
            holding.__exit__(None, None, None)


@contextmanager
def _lock(folder: Path, next_to: bool) -> Iterator[None]:
    check_output(folder, folder=True)
    folder = folder.resolve()
    home = folder.parent if next_to else folder
    path = home / (f".{folder.name}{LOCK_FILE}" if next_to else LOCK_FILE)
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
    """Make a lock, or take over that of a process that has ended; returns its token.

    To take over a lock, a process first links a claim: a file named by the token of the lock that it will replace.
    Only one process succeeds, and only that one may replace the lock. If it dies before, another process claims its
    claim in the same way.
    """
    owner = Owner.this_process()
    own = path.with_name(f"{path.name}-{owner.token}")
    content = owner.to_json()
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


def _write(path: Path, content: bytes) -> bool:
    """Write a new file; returns whether there was none."""
    try:
        with open(path, "xb") as file:
            file.write(content)
    except FileExistsError:
        return False
    return True


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
    return _write(path, content)  # a file system without links


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
    return Owner.from_json(text), state


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
    begun, first, logged = time.monotonic(), None, False
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
        if not logged:
            wait = duration(STALE_AFTER - age)
            logger.info(
                "%s may be being written by %s; waiting at most %s for a sign of life.",
                folder,
                owner or "another job",
                wait,
            )
            logged = True
        time.sleep(min(1.0, HEARTBEAT / 4))


def _refusal(folder: Path, path: Path, owner: Owner | None) -> UserError:
    return UserError(
        f"{folder} is being written by {owner or 'another job'}.",
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
