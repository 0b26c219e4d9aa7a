#!/bin/bash
# encode_special_tokens does not survive pickle, deepcopy or save: text becomes control tokens again.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check tokenizers==0.23.3
cd "$work"
venv/bin/python - <<'PYTHON'
import copy
import pickle

import tokenizers
from tokenizers import Tokenizer, models

print("tokenizers", tokenizers.__version__)
tokenizer = Tokenizer(models.BPE({"<s>": 0, "<": 1, "s": 2, ">": 3}, []))
tokenizer.add_special_tokens(["<s>"])
tokenizer.encode_special_tokens = True  # a marker typed into a text is text
tokenizer.save("tokenizer.json")
found = {
    "original": tokenizer,
    "pickle": pickle.loads(pickle.dumps(tokenizer)),
    "deepcopy": copy.deepcopy(tokenizer),
    "save and from_file": Tokenizer.from_file("tokenizer.json"),
}
ids = {name: one.encode("<s>").ids for name, one in found.items()}
for name, numbers in ids.items():
    print(f"{name}: {numbers}")
expected = {"original": [1, 2, 3]} | dict.fromkeys(list(found)[1:], [0])
raise SystemExit(ids != expected)
PYTHON
