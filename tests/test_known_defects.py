"""Known defects of other projects' generation and scoring, put in on purpose: the contract's checks must notice them.

The checks are the tests of generation and likelihood themselves. Defects of the transformer and its cache are in
test_transformer.py, those of the filters in test_sampling.py.
"""

import subprocess
import sys

import pytest
import test_generate
import test_likelihood
import torch
from noticing import fails_at

import smalti.engine.executors.base
import smalti.likelihood
from smalti.engine.engine import Engine, _Running
from smalti.models.decoder_only import DecoderOnly
from smalti.models.loss import token_nll
from smalti.sequences.request import TokenSequence


def test_a_check_that_fails_elsewhere_notices_nothing():
    def check():
        assert len("ab") == 3

    fails_at('assert len("ab") == 3', check)
    with pytest.raises(AssertionError, match="check fails at another place than `assert together == alone`"):
        fails_at("assert together == alone", check)


FORMULA = "assert found.draw_log_probs[-5 + step].item() == pytest.approx(expected.item(), abs=1e-4)"


def test_a_guidance_scale_that_is_ignored_is_noticed(monkeypatch):
    """parti-pytorch always takes 3."""
    guide = smalti.engine.executors.base.guide
    monkeypatch.setattr(smalti.engine.executors.base, "guide", lambda cond, null, scale: guide(cond, null, 3.0))
    fails_at(
        "assert torch.allclose(found.draw_log_probs[-5:], expected, atol=1e-4)",
        test_generate.test_guidance_of_one_is_the_conditional_model_and_of_zero_the_null,
    )
    fails_at(FORMULA, test_generate.test_guided_draws_follow_the_formula_at_every_step)


def test_guidance_with_its_arguments_swapped_is_noticed(monkeypatch):
    guide = smalti.engine.executors.base.guide
    monkeypatch.setattr(smalti.engine.executors.base, "guide", lambda cond, null, scale: guide(null, cond, scale))
    fails_at(FORMULA, test_generate.test_guided_draws_follow_the_formula_at_every_step)


def test_a_prompt_that_is_lost_after_the_first_step_is_noticed(monkeypatch):
    """DALLE-pytorch zeroes the text in place when it makes the null condition."""
    run = Engine._run

    def forgetful(self, rows, tokens):
        for running in self.guided:
            for both in self.state.both:
                both[:, running.row, :, : self.state.lengths[running.row]] = 0
        run(self, rows, tokens)

    monkeypatch.setattr(Engine, "_run", forgetful)
    test_generate.test_temperature_zero_is_greedy()
    fails_at(FORMULA, test_generate.test_guided_draws_follow_the_formula_at_every_step)


def test_a_second_pass_outside_the_guidance_interval_is_noticed(monkeypatch):
    """LlamaGen computes both halves at every step."""
    extend = Engine._extend

    def both_halves(self):
        for running in self.guided:
            running.scales = [running.config.guidance_scale] * len(running.scales)
        extend(self)

    monkeypatch.setattr(Engine, "_extend", both_halves)
    with monkeypatch.context() as inner:
        fails_at(
            "assert len([count for count in rows_run[1:] if count > 1]) <= end - interval[0]",
            test_generate.test_an_interval_skips_the_null_pass_and_changes_nothing_else,
            (0, 2),
            inner,
        )


def test_null_rows_that_do_not_catch_up_are_noticed(monkeypatch):
    pending = _Running.null_pending
    monkeypatch.setattr(_Running, "null_pending", lambda self, num_seen: pending(self, num_seen)[-1:])
    with monkeypatch.context() as inner:
        fails_at(
            "assert found.draw_log_probs[-5 + step].item() == pytest.approx(guided.item(), abs=1e-4)",
            test_generate.test_an_interval_skips_the_null_pass_and_changes_nothing_else,
            (3, None),
            inner,
        )


def test_randomness_that_belongs_to_the_batch_is_noticed(monkeypatch):
    init = TokenSequence.__init__
    shared = torch.Generator().manual_seed(0)

    def drawing_in_turn(self, layout, request):
        init(self, layout, request)
        self.__dict__["uniforms"] = torch.rand(layout.max_length, generator=shared, dtype=torch.float64)

    monkeypatch.setattr(TokenSequence, "__init__", drawing_in_turn)
    fails_at(
        "assert together == alone",
        test_generate.test_tokens_do_not_depend_on_the_batch_or_the_order_of_requests,
        test_generate.DIGITS,
    )


def test_scores_that_are_not_shifted_are_noticed(monkeypatch):
    """In evaluation mode LlamaGen's logits at t meet the target at t."""

    def unshifted(model, packed, slots):
        token_ids = torch.cat((packed.token_ids[:, 1:], packed.token_ids[:, :1]), dim=1)
        hidden = DecoderOnly.hidden
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(DecoderOnly, "hidden", lambda self, ids: hidden(self, token_ids)[:, : ids.shape[1]])
            return token_nll(model, packed, slots)

    monkeypatch.setattr(smalti.likelihood, "token_nll", unshifted)
    fails_at(
        "assert found[name][row].item() == pytest.approx(nats, abs=1e-4)",
        test_likelihood.test_scores_equal_a_plain_loop_and_do_not_depend_on_the_batch,
        "text first",
    )
    fails_at(
        "assert -found.log_prob == pytest.approx(total - first_nats, abs=1e-4)",
        test_likelihood.test_scores_equal_the_generators_log_probs,
    )


def test_log_probs_of_the_unfiltered_distribution_are_noticed(monkeypatch):
    """A draw that is reported with the model's own log-probability although a filter reshaped it."""
    sample = smalti.engine.executors.base.sample

    def unfiltered(logits, uniforms, config):
        ids, _ = sample(logits, uniforms, config)
        return ids, smalti.engine.executors.base.log_prob_of(logits, ids)

    monkeypatch.setattr(smalti.engine.executors.base, "sample", unfiltered)
    fails_at(FORMULA, test_generate.test_guided_draws_follow_the_formula_at_every_step)


SIDE_EFFECTS = """
import importlib, logging, pkgutil, socket, threading
import torch
def refuse(*args, **kwargs):
    raise OSError("an import opened a socket")
socket.socket.connect = refuse
state, threads = torch.random.get_rng_state(), torch.get_num_threads()
import smalti.training.estimate, smalti.progress
assert threading.active_count() == 1
for module in pkgutil.walk_packages(smalti.__path__, "smalti."):
    importlib.import_module(module.name)
assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32
assert torch.get_num_threads() == threads and torch.equal(torch.random.get_rng_state(), state)
assert not logging.getLogger().handlers
assert not torch.are_deterministic_algorithms_enabled()
"""


def test_importing_changes_nothing():
    """min-dalle switches gradients off for whoever imports it."""
    done = subprocess.run([sys.executable, "-c", SIDE_EFFECTS], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
