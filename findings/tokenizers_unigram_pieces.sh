#!/bin/bash
# UnigramTrainer proposes only pieces that stand in two different words: how often a word stands does not count.
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


def pieces(captions):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(captions, trainers.UnigramTrainer(vocab_size=100, show_progress=False))
    return tokenizer.encode("a red square").tokens


few = pieces(["a red square", "a green circle"] * 1000)
more = pieces(["a red square", "a green circle", "reddish squares"] * 1000)
print("two captions, a thousand times each:", few)
print("and a third, with two words that begin alike:", more)
raise SystemExit(not (max(map(len, few)) <= 2 and max(map(len, more)) >= 4))
PYTHON
