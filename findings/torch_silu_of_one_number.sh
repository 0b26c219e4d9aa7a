#!/bin/bash
# On a CPU F.silu, sigmoid and gelu (tanh) of a tensor full of one number hold two different numbers.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cd "$work"
venv/bin/python - <<'PYTHON'
import torch
import torch.nn.functional as F

torch.set_num_threads(1)
print("torch", torch.__version__, torch.backends.cpu.get_cpu_capability())
functions = {"silu": F.silu, "sigmoid": torch.sigmoid, "gelu": lambda x: F.gelu(x, approximate="tanh"), "exp": torch.exp}
found = {}
for name, function in functions.items():
    results = [(x, set(function(torch.full((100,), x)).tolist())) for x in torch.linspace(-6, 6, 2001).tolist()]
    apart = [(x, values) for x, values in results if len(values) > 1]
    found[name] = len(apart)
    print(f"{name} of 100 times one number: {len(apart)} of 2001 numbers have two results", end="")
    print(f", as {apart[0][0]:.3f}: {sorted(apart[0][1])}" if apart else "")

x = torch.randn(70_001, generator=torch.Generator().manual_seed(0))
one = F.gelu(x, approximate="tanh")
torch.set_num_threads(2)
two = F.gelu(x, approximate="tanh")
print("gelu of 70,001 numbers on one thread and on two:", int((one != two).sum()), "differ")
raise SystemExit(not (min(found[name] for name in ("silu", "sigmoid", "gelu")) > 0 and found["exp"] == 0))
PYTHON
