"""Runs verbs in every process that was launched, the second with other words, and notes what each was told:
differing.py CASES OUT, where CASES is a JSON list of [words, {word of the first process: word of the second}].
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from latent_medi.cli import run_verb
from latent_medi.core.errors import UserError

cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
rank = os.environ["RANK"]
told = []
for words, instead in cases:
    for old, new in instead.items() if rank == "1" else ():
        words = [word.replace(old, new) for word in words]
    try:
        run_verb(words)
        told.append("")
    except UserError as error:
        told.append(str(error))
(out / f"rank-{rank}.json").write_text(json.dumps(told))
