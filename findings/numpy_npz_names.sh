#!/bin/bash
# An npz file holds the arrays 'a' and 'a.npy'; reading gives the first under both names.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check numpy==2.4.6
cd "$work"
venv/bin/python - <<'PYTHON'
import numpy as np

print("numpy", np.__version__)
np.savez("arrays.npz", **{"a": np.arange(2), "a.npy": np.arange(3)})
with np.load("arrays.npz") as stored:
    print("names in the file:", stored.files)
    read = {name: stored[name].tolist() for name in stored.files}
print("written: {'a': [0, 1], 'a.npy': [0, 1, 2]}")
print("read:   ", read)
raise SystemExit(read != {"a": [0, 1], "a.npy": [0, 1]})
PYTHON
