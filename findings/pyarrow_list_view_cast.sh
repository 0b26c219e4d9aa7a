#!/bin/bash
# A cast from list_view to list empties the last row, without an error.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check pyarrow==26.0.1
cd "$work"
venv/bin/python - <<'PYTHON'
import pyarrow as pa

print("pyarrow", pa.__version__)
rows = [[1, 2], [3]]
views = pa.array(rows, pa.list_view(pa.int64()))
views.validate(full=True)
cast = {kind: views.cast(pa.list_(pa.int64()) if kind == "list" else pa.large_list(pa.int64())).to_pylist()
        for kind in ("list", "large_list")}
print("list_view, validated:", views.to_pylist())
for kind, values in cast.items():
    print(f"cast to {kind}:", values)
raise SystemExit(cast != {"list": [[1, 2], []], "large_list": [[1, 2], []]})
PYTHON
