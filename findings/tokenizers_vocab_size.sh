#!/bin/bash
# BpeTrainer's vocab_size is no upper bound: a larger alphabet wins, without a word.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check tokenizers==0.23.3
cd "$work"
venv/bin/python - <<'PYTHON'
import tokenizers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

print("tokenizers", tokenizers.__version__)
alphabet = pre_tokenizers.ByteLevel.alphabet()
sizes = {}
for asked in (100, 300):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=asked, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["a red door"], trainer)
    sizes[asked] = tokenizer.get_vocab_size()
    print(f"BPE: vocab_size={asked} asked for, {sizes[asked]} tokens made")
try:
    Tokenizer(models.Unigram()).train_from_iterator(["abcdefgh"], trainers.UnigramTrainer(vocab_size=4, show_progress=False))
    refused = False
except Exception as error:
    print("Unigram: vocab_size=4 for 8 letters:", error)
    refused = True
raise SystemExit(not (sizes[100] == 256 and sizes[300] < 300 and refused))
PYTHON
