#!/bin/bash
# BPE without unk_token leaves out what it does not know; the three other models raise.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check tokenizers==0.23.3
cd "$work"
venv/bin/python - <<'PYTHON'
import tokenizers
from tokenizers import Tokenizer, models

print("tokenizers", tokenizers.__version__)
vocabulary = {"a": 0, "b": 1}
encoding = Tokenizer(models.BPE(vocabulary, [])).encode("axb")
print("BPE: 'axb' becomes", encoding.tokens)
raised = []
for model in (models.WordLevel(vocabulary), models.WordPiece(vocabulary), models.Unigram([("a", 0.0), ("b", -1.0)])):
    try:
        print(type(model).__name__, Tokenizer(model).encode("x").ids)
    except Exception as error:
        print(f"{type(model).__name__}: {error}")
        raised.append(type(model).__name__)
raise SystemExit(encoding.tokens != ["a", "b"] or len(raised) != 3)
PYTHON
