"""Compiled networks: they start slowly, so they come last."""

from __future__ import annotations

from collections.abc import Callable

from gpu_parts.child import Context, NeedsGpu
from gpu_parts.smoke_train import compare, losses_of, settings_of


def _compiled(model: str) -> Callable[[Context], None]:
    def row(context: Context) -> None:
        if not context.gpu:
            raise NeedsGpu("a CPU's compiler is another one")
        settings = settings_of(context, model, precision="bf16", channels_last=True, compile=True)
        compare(context, model, *losses_of(context, settings))

    return row


ROWS: dict[str, Callable[[Context], None]] = {f"train {m} compiled": _compiled(m) for m in ("demo", "S")}
