"""Everything that only a GPU can show, within minutes: does it run and agree, what does it make, how fast is it.

    python benchmarks/gpu.py [--budget 540] [--out runs/gpu] [--parts smoke,real,rates,demo] [--quick] [--device cpu]
    python benchmarks/gpu.py --parts histodiffusion [--budget 540] [--out runs/gpu]

smoke: every precision, way of training, sampler and full memory, each against fp32 or the CPU within a stated bound.
real: `latent-medi run` with configs/prostate/256px.yaml on real biopsies, as many updates as fit, and a picture of all
six combinations of class and hospital, real, MeDi and CLS. rates: images per second and memory against plain
loops, pixels and the estimate. demo: the demo, its headline compared with the CPU's. histodiffusion, only where it is
asked for, with a budget of its own: `latent-medi run` with configs/histodiffusion/prostate_256px.yaml, pre-trained on
other tissue, and the accuracy of image classifiers with and without each set of selected patches.

Each row is written the moment it is done: OUT/PART/ROW.json with revision, card, command and seconds, with logs and
pictures; OUT/results.json holds all, OUT/table.txt the last table, OUT/measured.json what `train --estimate` reports of
cards (copied over latent_medi/training/estimate/measured.json). Parts without a result come first, then the oldest.
It ends by itself inside the budget; the same command goes on with what was left out, cut off or killed, and with
another revision or card begins anew. Exit code 0: every row that ran holds; 1: one does not; 2: it cannot be run so.

--quick takes tiny sizes, on any device; what needs a GPU then says so instead of passing.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

START = time.time()
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from gpu_parts import records  # noqa: E402
from gpu_parts.plan import BUDGET, PARTS, TOGETHER  # noqa: E402
from gpu_parts.runner import Machine, Options, Runner  # noqa: E402

from latent_medi.core.errors import UserError  # noqa: E402
from latent_medi.core.locks import output_lock  # noqa: E402

SHARED = records.ROOT.parent / "shared"

_PROBE = """
import json, platform, torch
card, memory = "", 0.0
if torch.cuda.is_available():
    seen = torch.cuda.get_device_properties(0)
    card, memory = seen.name, seen.total_memory / 2**30
print(json.dumps({"card": card, "torch": torch.__version__, "memory_gib": memory}))
"""


def look(device: str) -> tuple[str, Machine]:
    """The device and what it is, by a process of its own: this one takes none of the card's memory."""
    probe = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, check=False)
    if probe.returncode:
        raise UserError(f"torch cannot be used: {(probe.stderr.strip().splitlines() or ['no message'])[-1]}")
    found = json.loads(probe.stdout.strip().splitlines()[-1])
    if device != "cpu" and not found["card"]:
        raise UserError("torch sees no GPU here.", "Add --device cpu --quick to try every part on the CPU.")
    if device == "cpu":
        return "cpu", Machine("CPU", found["torch"])
    return "cuda", Machine(found["card"], found["torch"], found["memory_gib"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [part.name for part in PARTS]
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds after which it has ended (default 540)")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of results (default runs/gpu)")
    together = ",".join(part.name for part in TOGETHER)
    parser.add_argument("--parts", default=together, help=f"some of {','.join(names)} (default: {together})")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where to run (default cuda)")
    parser.add_argument("--real", type=Path, default=SHARED / "data/prostate", help="folder of the biopsies' patches")
    parser.add_argument(
        "--other", type=Path, default=SHARED / "data/unlabelled/consep", help="folder of patches of other tissue"
    )
    parser.add_argument("--models", type=Path, default=SHARED / "models", help="folder with taef2 and squeezenet")
    arguments = parser.parse_args()
    asked = [word.strip() for word in arguments.parts.split(",") if word.strip()]
    if unknown := [word for word in asked if word not in names] or (["nothing"] if not asked else []):
        raise UserError(f"There is no part {', '.join(unknown)}.", f"The parts are {', '.join(names)}.")
    if not arguments.budget > 0:
        raise UserError(f"--budget is {arguments.budget}.", "Give seconds, such as 540.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by an exception, so that processes started here end too
    device, machine = look(arguments.device)
    options = Options(
        arguments.out,
        arguments.budget,
        arguments.quick,
        device,
        arguments.real.resolve(),
        arguments.models.resolve(),
        arguments.other.resolve(),
        start=START,
    )
    with output_lock(options.out):
        return Runner([part for part in PARTS if part.name in asked], options, machine).go()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)
