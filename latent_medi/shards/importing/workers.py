"""Calls distributed by joblib on this machine, or by Dask to other machines that see the same files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar

from joblib import Parallel, delayed, parallel_config

from latent_medi.core.errors import UserError, needs
from latent_medi.core.processes import call_tied, safe_helpers

T = TypeVar("T")


def dispatch(
    function: Callable[..., T],
    tasks: Sequence[tuple[Any, ...]],
    jobs: int,
    dask: str = "",
    backend: Literal["loky", "threading"] = "loky",
) -> Iterator[T]:
    """The function's results in the order of the tasks, each as soon as it and those before it are done.

    Args:
        function: With ``dask``, importable there.
        tasks: Arguments of each call.
        jobs: Calls at the same time on this machine; not used with ``dask``.
        dask: Address of a Dask scheduler, such as ``tcp://host:8786``; empty for this machine.
        backend: Processes (``loky``) or threads on this machine.

    Raises:
        UserError: Dask is not installed, or no scheduler answers.
    """
    if not tasks:
        return
    if not dask:
        calls = (delayed(call_tied)(os.getpid(), function, *task) for task in tasks)
        with safe_helpers():
            yield from Parallel(n_jobs=jobs, backend=backend, return_as="generator")(calls)
        return
    calls = (delayed(function)(*task) for task in tasks)
    with needs("dask=…", "'latent-medi[cluster]'"):
        from dask.distributed import Client
    try:
        client = Client(dask, timeout="30s")
    except (OSError, TimeoutError, ValueError) as error:
        raise UserError(f"No Dask scheduler answers at {dask}: {error}.", "Start one, or correct dask=….") from None
    with client, parallel_config("dask", client=client):
        # Not batched: a task is seconds to minutes, and one that is lost with its worker is done again.
        yield from Parallel(n_jobs=-1, batch_size=1, return_as="generator")(calls)
