#!/bin/bash
# On a CPU the first values of torch.randn depend on how many are drawn; those of torch.rand do not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$work"
venv/bin/python - <<'PYTHON'
import torch

print("torch", torch.__version__)
first = {}
for draw in (torch.rand, torch.randn):
    for count in (15, 16, 17):
        generator = torch.Generator().manual_seed(0)
        first[draw.__name__, count] = [round(x, 4) for x in draw(count, generator=generator)[:3].tolist()]
        print(f"{draw.__name__}({count})[:3] with seed 0:", *first[draw.__name__, count])
same = first["rand", 15] == first["rand", 16] == first["rand", 17]
differ = len({tuple(first["randn", count]) for count in (15, 16, 17)}) == 3
raise SystemExit(not (same and differ))
PYTHON
