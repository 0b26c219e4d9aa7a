"""Some damaged inputs for every reader, always the same: `make fuzz` tries many more (see fuzz/run.py)."""

import os
import subprocess
import sys
from pathlib import Path

FUZZ = Path(__file__).with_name("fuzz") / "run.py"


def test_damaged_inputs_of_every_reader_are_refused_in_words(tmp_path):
    command = [sys.executable, str(FUZZ), "--inputs", "20", "--seed", "1", "--finds", str(tmp_path / "finds")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, env={**os.environ, "SMALTI_NATIVE": "0"}
    )
    found = "\n".join(path.read_text() for path in sorted(tmp_path.rglob("*.txt")))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-2000:]}\n{found}"
    assert " 0 finds" in done.stdout.splitlines()[-1]
