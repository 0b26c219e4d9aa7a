"""`smalti doctor`: bundles that keep what they promise, and bundles that do not."""

import json

import pytest
import torch
from tiny_bundle import save_tiny_bundle, tiny_bpe_pipeline, tiny_pipeline
from tiny_lines import tiny_line_model

from smalti.bundle import Bundle
from smalti.cli.app import run
from smalti.engine.executors import packed
from smalti.models.transformer import Transformer
from smalti.sequences.request import TokenSequence
from smalti.tasks.doctor import examine, with_certificate

CHECKS = (
    "weights are finite",
    "cached steps = whole sequences",
    "nats = −Σ log-probs of what is drawn",
    "drawn together = drawn alone",
    "executors agree",
    "same seed, same sequence",
)
TOKENIZERS = ("image tokenizer: codes to pictures and back", "text tokenizer: words to ids and back")


def failed(bundle: Bundle) -> list[str]:
    return [check.name for check in examine(bundle, num_tokens=12).checks if not check.holds]


@pytest.mark.parametrize("kind", ["digits", "captions", "lines"])
def test_every_kind_of_bundle_keeps_what_it_promises(kind):
    bundle = {"digits": tiny_pipeline, "captions": tiny_bpe_pipeline, "lines": tiny_line_model}[kind]().bundle
    certificate = examine(bundle, num_tokens=12)
    assert certificate.holds, certificate
    wanted = CHECKS if kind == "lines" else (*CHECKS, *TOKENIZERS)
    assert tuple(check.name for check in certificate.checks) == wanted
    assert certificate.weights_sha256 == bundle.weights_sha256
    assert "packed within" in certificate.checks[4].found


@pytest.mark.parametrize(
    ("kind", "name"), [("llamagen", "llamagen_gpt_c2i"), ("llamagen", "llamagen_gpt_t2i"), ("rar", "rar")]
)
def test_imported_models_keep_it_too(tmp_path, shared_dir, kind, name, capsys):
    file = next((shared_dir / "golden" / name).glob("weights.*"))
    assert run(["import", kind, str(file), "-o", str(tmp_path / "bundle"), "--quiet"]) == 0
    capsys.readouterr()
    assert run(["doctor", str(tmp_path / "bundle"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["holds"] and [check["name"] for check in found["checks"]] == list(CHECKS)
    assert "guided and not" in found["checks"][3]["found"]  # these have a null condition


def test_the_certificate_goes_into_the_card_once(tmp_path, capsys):
    directory = save_tiny_bundle(tmp_path / "bundle")
    before = (directory / "README.md").read_text()
    for _ in range(2):
        assert run(["doctor", str(directory), "--tokens", "4", "--card"]) == 0
    card = (directory / "README.md").read_text()
    assert card.startswith(before.rstrip("\n")) and card.count("## Certificate") == 1
    assert Bundle.load(directory).weights_sha256 in card
    assert "holds" in capsys.readouterr().out


def test_weights_that_are_not_finite_fail_by_name():
    bundle = tiny_pipeline().bundle
    with torch.no_grad():
        bundle.model.transformer.blocks[0].attention.out.weight[0, 0] = torch.nan
    certificate = examine(bundle, num_tokens=4)
    assert not certificate.holds and "attention.out.weight" in certificate.checks[0].found
    assert not certificate.checks[1].holds


def test_a_cache_that_forgets_is_found(monkeypatch):
    plain = Transformer.extend

    def forgetful(self, x, state, rows, *given, **named):
        found = plain(self, x, state, rows, *given, **named)
        for both in state.both:
            both[:, :, :, 0] = 0.5
        return found

    monkeypatch.setattr(Transformer, "extend", forgetful)
    assert set(failed(tiny_pipeline().bundle)) >= {CHECKS[1], CHECKS[2]}


def test_an_executor_that_is_off_is_found(monkeypatch):
    plain = packed.Packed.logits
    monkeypatch.setattr(packed.Packed, "logits", lambda self, *given: plain(self, *given) * 1.01)
    assert failed(tiny_pipeline().bundle) == ["executors agree"]


def test_randomness_that_is_not_the_seeds_is_found(monkeypatch):
    uniforms = property(lambda self: torch.rand(self.layout.max_length, dtype=torch.float64))
    monkeypatch.setattr(TokenSequence, "uniforms", uniforms)
    assert set(failed(tiny_pipeline().bundle)) >= {CHECKS[3], CHECKS[5]}


def test_a_failure_is_told_in_words_and_by_the_status(tmp_path, monkeypatch, capsys):
    directory = save_tiny_bundle(tmp_path / "bundle")
    plain = packed.Packed.logits
    monkeypatch.setattr(packed.Packed, "logits", lambda self, *given: plain(self, *given) * 1.01)
    assert run(["doctor", str(directory), "--tokens", "4"]) == 1
    printed = capsys.readouterr()
    assert "tiny does not keep its promises: executors agree" in printed.err and "FAILS" in printed.out
    assert "**fails**" in with_certificate("# tiny\n", examine(Bundle.load(directory), num_tokens=4))
