"""The tests that need a card."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable

from gpu_parts import records
from gpu_parts.child import Context, NotHere
from latent_medi.core.processes import environment


def _tests(context: Context) -> None:
    folder = records.ROOT / "tests"
    if not folder.is_dir():
        raise NotHere("this copy has no tests")
    if missing := [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]:
        raise NotHere(f"{' and '.join(missing)} not installed")
    marked = [str(file) for file in sorted(folder.rglob("test_*.py")) if "mark.gpu" in file.read_text(encoding="utf-8")]
    context.only_on_gpu()
    if not marked:
        context.require(not context.gpu, "no test is marked gpu")
        return
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *marked]
    context.command = "pytest -m gpu " + " ".join(marked)
    log = context.pictures / "pytest.log"
    with log.open("wb") as output:
        code = subprocess.run(
            words, cwd=records.ROOT, env=environment(), stdout=output, stderr=subprocess.STDOUT, check=False
        ).returncode
    last = (log.read_text(errors="replace").strip().splitlines() or [""])[-1]
    context.show(pytest=re.sub(r"=+ ?| ?=+", "", last))
    context.require(code == 0 or (code == 5 and not context.gpu), f"pytest ended with exit code {code}: {last}")
    context.require(not context.gpu or "passed" in last, f"no test ran: {last}")


ROWS: dict[str, Callable[[Context], None]] = {"pytest -m gpu": _tests}
