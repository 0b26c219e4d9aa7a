"""Quantizers against hand-worked numbers, brute force, vector-quantize-pytorch, and two processes against one."""

import math
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from smalti.image_tokenizers import quantizer as module
from smalti.image_tokenizers.quantizer import (
    CodebookHealth,
    FiniteScalarQuantizer,
    FSQConfig,
    IBQConfig,
    IndexBackpropagationQuantizer,
    LFQConfig,
    LookupFreeQuantizer,
    QuantizerConfig,
    VectorQuantizer,
    entropy_penalty,
    largest_product,
    make_quantizer,
    nearest,
    rotate_onto,
    straight_through,
)


def quantizer_with(codebook, **fields):
    codebook = torch.tensor(codebook)
    config = QuantizerConfig(codebook_size=len(codebook), code_dim=codebook.shape[1], **fields)
    quantizer = VectorQuantizer(config)
    quantizer.codebook.data.copy_(codebook)
    return quantizer


# The nearest code ---------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 7), st.integers(0, 10**6))
def test_nearest_is_the_nearest_by_brute_force(num_vectors, num_entries, width, seed):
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(num_vectors, width, generator=generator)
    entries = torch.randn(num_entries, width, generator=generator)
    found = (vectors - entries[nearest(vectors, entries)]).norm(dim=-1)
    least = (vectors[:, None] - entries).norm(dim=-1).amin(1)
    torch.testing.assert_close(found, least, atol=1e-5, rtol=1e-5)


def test_nearest_never_builds_a_matrix_beyond_the_stated_bound(monkeypatch):
    """The largest product is watched; 1,009 vectors against 47 entries would be 189,692 bytes at once."""
    largest = 0
    addmm = torch.addmm

    def watched(*args, **kwargs):
        nonlocal largest
        product = addmm(*args, **kwargs)
        largest = max(largest, product.numel() * product.element_size())
        return product

    vectors, entries = torch.randn(1009, 5), torch.randn(47, 5)
    at_once = nearest(vectors, entries)
    monkeypatch.setattr(module, "SEARCH_BYTES", 10_000)
    monkeypatch.setattr(torch, "addmm", watched)
    assert torch.equal(nearest(vectors, entries), at_once)
    assert 9_000 < largest <= 10_000


def test_near_codes_are_told_apart_under_autocast():
    """In bf16 both entries are 1.0 and the first would win."""
    quantizer = quantizer_with([[1.0, 0.0], [1.001, 0.0]]).eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert quantizer(torch.tensor([[1.002, 0.0]])).codes.tolist() == [1]


@pytest.mark.parametrize("l2_normalised", [False, True])
def test_encode_finds_the_codes_of_looked_up_entries(l2_normalised):
    torch.manual_seed(1)
    quantizer = VectorQuantizer(QuantizerConfig(codebook_size=13, code_dim=5, l2_normalised=l2_normalised))
    codes = torch.randint(13, (2, 3, 7))
    latents = quantizer.lookup(codes)
    assert latents.shape == (2, 3, 7, 5)
    assert torch.equal(quantizer.encode(latents), codes)
    if l2_normalised:
        torch.testing.assert_close(latents.norm(dim=-1), torch.ones(2, 3, 7))
        assert torch.equal(quantizer.encode(17 * latents), codes)


# The largest dot product ---------------------------------------------------------------------------------------


def ibq_with(codebook, **fields):
    codebook = torch.as_tensor(codebook)
    quantizer = IndexBackpropagationQuantizer(
        IBQConfig(codebook_size=len(codebook), code_dim=codebook.shape[1], **fields)
    )
    quantizer.codebook.data.copy_(codebook)
    return quantizer


def test_largest_products_of_a_case_worked_by_hand():
    """(1, 0) has the products 1, 0, 3 and (-1, 1) has -1, 2, 0: the nearest entry of the first would be entry 0. Of
    equals, as all are for (0, 0), the first is taken; twice the latent has the same code."""
    quantizer = ibq_with([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    latents = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [0.0, 0.0]])
    assert quantizer.encode(latents).tolist() == quantizer.encode(2 * latents).tolist() == [2, 1, 0]
    assert nearest(latents, quantizer.codebook).tolist() == [0, 1, 0]
    assert quantizer.lookup(torch.tensor([[2, 1]])).tolist() == [[[3.0, 3.0], [0.0, 2.0]]]
    with pytest.raises(ValueError, match=r"code 3 is outside the codebook: codes lie in 0\.\.2"):
        quantizer.lookup(torch.tensor([3]))


@settings(max_examples=50)
@given(st.integers(0, 90), st.integers(1, 60), st.integers(1, 7), st.integers(4, 2000), st.integers(0, 10**6))
def test_the_search_in_any_blocks_is_that_of_a_loop(num_vectors, num_entries, width, search_bytes, seed):
    """Whole numbers, so that products are exact and ties are frequent."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randint(-3, 4, (num_vectors, width), generator=generator).float()
    entries = torch.randint(-3, 4, (num_entries, width), generator=generator).float()
    products, distances = [], []
    for vector in vectors.tolist():
        scores = [sum(a * b for a, b in zip(vector, entry, strict=True)) for entry in entries.tolist()]
        squares = [sum((a - b) ** 2 for a, b in zip(vector, entry, strict=True)) for entry in entries.tolist()]
        products.append(scores.index(max(scores)))
        distances.append(squares.index(min(squares)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SEARCH_BYTES", search_bytes)
        assert largest_product(vectors, entries).tolist() == products
        assert nearest(vectors, entries).tolist() == distances


def test_a_large_codebook_is_searched_within_the_stated_bound(monkeypatch):
    """262,144 entries, as IBQ's and Open-MAGVIT2's largest have; at once, 300 vectors would take 300 MiB."""
    largest, addmm = 0, torch.addmm

    def watched(*args, **kwargs):
        nonlocal largest
        product = addmm(*args, **kwargs)
        largest = max(largest, product.numel() * product.element_size())
        return product

    generator = torch.Generator().manual_seed(0)
    entries = torch.randn(2**18, 3, generator=generator)
    vectors = entries[torch.randint(2**18, (300,), generator=generator)]
    monkeypatch.setattr(torch, "addmm", watched)
    codes = largest_product(vectors, entries)
    assert 0 < largest <= module.SEARCH_BYTES
    best = torch.cat([(rows @ entries.t()).amax(-1) for rows in vectors.split(20)])
    torch.testing.assert_close((vectors * entries[codes]).sum(-1), best)


def test_ibq_losses_of_a_case_worked_by_hand():
    """(1, 0) is given (3, 3), which is 2 and 3 away: mean square 13 / 2, once for each side and once for both."""
    out = ibq_with([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]], codebook_weight=0.25)(torch.tensor([[1.0, 0.0]]))
    assert out.codes.tolist() == [2] and out.latents.tolist() == [[3.0, 3.0]]
    assert out.codebook_loss.item() == 6.5 + 0.25 * 6.5 and out.commitment_loss.item() == 6.5
    assert out.entropy_loss.item() == 0


@pytest.mark.parametrize("search_bytes", [module.SEARCH_BYTES, 200])
def test_ibq_gradients_are_those_of_its_one_hot_choice(monkeypatch, search_bytes):
    """As the original writes it: one-hot = hard - soft.detach() + soft over all entries, times the codebook."""
    monkeypatch.setattr(module, "SEARCH_BYTES", search_bytes)
    torch.manual_seed(3)
    codebook, latents = torch.randn(11, 3), torch.randn(2, 5, 3)
    direction = torch.randn(2, 5, 3)
    quantizer = ibq_with(codebook, codebook_weight=0.5, entropy_weight=0.3, entropy_temperature=0.7)
    ours = latents.clone().requires_grad_()
    out = quantizer(ours)
    assert torch.equal(out.latents, quantizer.lookup(out.codes))
    ((out.latents * direction).sum() + out.loss).backward()

    z, e = latents.clone().requires_grad_(), codebook.clone().requires_grad_()
    logits = z @ e.T
    soft, hard = logits.softmax(-1), torch.eye(11)[logits.argmax(-1)]
    z_q, chosen = (hard - soft.detach() + soft) @ e, hard @ e
    shares = (logits / 0.7).softmax(-1).view(-1, 11)
    entropy = -(shares * shares.log()).sum(-1).mean() + (shares.mean(0) * shares.mean(0).log()).sum()
    both, first, second = (z_q - z).square(), (chosen.detach() - z).square(), (chosen - z.detach()).square()
    loss = both.mean() + first.mean() + 0.5 * second.mean() + 0.3 * entropy
    ((z_q * direction).sum() + loss).backward()
    assert out.codes.tolist() == logits.argmax(-1).tolist()
    torch.testing.assert_close(out.loss, loss)
    torch.testing.assert_close(ours.grad, z.grad)
    assert quantizer.codebook.grad is not None and quantizer.codebook.grad.abs().sum(1).gt(0).all()
    torch.testing.assert_close(quantizer.codebook.grad, e.grad)


def test_near_products_are_told_apart_under_autocast():
    quantizer = ibq_with([[1.0, 0.0], [1.001, 0.0]]).eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert quantizer(torch.tensor([[1.0, 0.0]])).codes.tolist() == [1]


# Losses and gradients ------------------------------------------------------------------------------------------


def test_losses_of_a_case_worked_by_hand():
    """Latents (1, 0) and (0, 3); the nearest entries (0, 0) and (0, 4) are 1 and 1 away: mean square 2 / 4."""
    quantizer = quantizer_with([[0.0, 0.0], [0.0, 4.0]], update="gradient", commitment_weight=0.25)
    latents = torch.tensor([[1.0, 0.0], [0.0, 3.0]], requires_grad=True)
    out = quantizer(latents)
    assert out.codes.tolist() == [0, 1]
    assert out.codebook_loss.item() == 0.5 and out.commitment_loss.item() == 0.125 and out.entropy_loss.item() == 0
    out.loss.backward()
    # d/dz of 0.25/4 sum (z - e)^2, and d/de of 1/4 sum (e - z)^2: each loss moves only its own side.
    assert latents.grad is not None and latents.grad.tolist() == [[0.125, 0.0], [0.0, -0.125]]
    assert quantizer.codebook.grad is not None and quantizer.codebook.grad.tolist() == [[-0.5, 0.0], [0.0, 0.5]]


@pytest.mark.parametrize("update", ["gradient", "ema", "clustering"])
@pytest.mark.parametrize("rotation_trick", [False, True])
def test_output_is_the_code_to_the_last_bit(update, rotation_trick):
    torch.manual_seed(2)
    quantizer = VectorQuantizer(
        QuantizerConfig(codebook_size=11, code_dim=3, update=update, rotation_trick=rotation_trick)
    )
    quantizer.codebook.data.normal_()
    quantizer.eval()
    out = quantizer(torch.randn(5, 7, 3))
    assert torch.equal(out.latents, quantizer.lookup(out.codes))


def test_gradient_passes_straight_through():
    latents = torch.randn(7, 3, requires_grad=True)
    given_gradient = torch.randn(7, 3)
    straight_through(latents, torch.randn(7, 3)).backward(given_gradient)
    assert latents.grad is not None and torch.equal(latents.grad, given_gradient)


def test_rotation_turns_the_gradient_as_the_latent_is_turned():
    """(2, 0) onto (0, 3) is a quarter turn and a stretch by 1.5, so the gradient (1, 0) comes back as 1.5 (0, -1)."""
    latents = torch.tensor([[2.0, 0.0]], requires_grad=True)
    rotate_onto(latents, torch.tensor([[0.0, 3.0]])).backward(torch.tensor([[1.0, 0.0]]))
    assert latents.grad is not None
    torch.testing.assert_close(latents.grad, torch.tensor([[0.0, -1.5]]))


def test_rotation_gradient_equals_the_oracle():
    oracle = pytest.importorskip("vector_quantize_pytorch.vector_quantize_pytorch").rotate_to
    torch.manual_seed(3)
    chosen, given_gradient = torch.randn(11, 5), torch.randn(11, 5)
    ours = torch.randn(11, 5, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    rotate_onto(ours, chosen).backward(given_gradient)
    oracle(theirs, chosen).backward(given_gradient)
    assert ours.grad is not None and theirs.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_entropy_penalty_by_the_definition_and_in_blocks(monkeypatch):
    torch.manual_seed(4)
    vectors = torch.randn(23, 5, requires_grad=True)
    entries = torch.randn(7, 5, requires_grad=True)
    q = (-(vectors[:, None] - entries).square().sum(-1) / 0.7).softmax(-1)
    expected = -(q * q.log()).sum(-1).mean() + (q.mean(0) * q.mean(0).log()).sum()
    wanted = torch.autograd.grad(expected, [vectors, entries])

    monkeypatch.setattr(module, "SEARCH_BYTES", 4 * 7 * 5)  # five vectors a block
    found = entropy_penalty(vectors, entries, temperature=0.7)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, [vectors, entries]), wanted, atol=1e-6, rtol=1e-5)


def test_backward_sees_the_entries_as_they_were_before_the_update():
    """The penalty is recomputed in the backward pass, after the running means have moved the codebook."""
    torch.manual_seed(5)
    codebook = torch.randn(7, 3).tolist()
    latents = torch.randn(11, 3)
    gradients = []
    for training in (True, False):
        quantizer = quantizer_with(codebook, entropy_weight=1.0, entropy_temperature=1.0).train(training)
        given_latents = latents.clone().requires_grad_()
        quantizer(given_latents).loss.backward()
        gradients.append(given_latents.grad)
    assert torch.equal(*gradients)


# Running means, k-means, restarts, clustering ---------------------------------------------------------------------


def test_running_means_of_a_case_worked_by_hand():
    """Decay 0.5 from counts (1, 1): entry 0 is given (1, 0) and (3, 0), entry 1 nothing."""
    quantizer = quantizer_with([[1.0, 0.0], [0.0, 9.0]], ema_decay=0.5)
    quantizer.ema_sums.copy_(quantizer.codebook)
    quantizer(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
    assert quantizer.ema_counts.tolist() == [1.5, 0.5]
    assert quantizer.ema_sums.tolist() == [[2.5, 0.0], [0.0, 4.5]]
    # counts with 1e-5 added and the total 2 kept: 1.50001 * 2 / 2.00002 and 0.50001 * 2 / 2.00002
    expected = torch.tensor([[2.5 / (1.50001 / 1.00001), 0.0], [0.0, 4.5 / (0.50001 / 1.00001)]])
    torch.testing.assert_close(quantizer.codebook, expected, rtol=1e-6, atol=0)


def test_running_means_equal_the_oracle():
    oracle_class = pytest.importorskip("vector_quantize_pytorch").VectorQuantize
    torch.manual_seed(6)
    oracle = oracle_class(dim=5, codebook_size=13, decay=0.9, commitment_weight=0.25)
    ours = quantizer_with(oracle.codebook.tolist(), ema_decay=0.9)
    ours.ema_sums.copy_(oracle._codebook.embed_avg[0])
    ours.ema_counts.copy_(oracle._codebook.cluster_size[0])
    for _ in range(5):
        latents = torch.randn(2, 17, 5)
        theirs, their_codes, their_loss = oracle(latents)
        out = ours(latents)
        assert torch.equal(out.codes, their_codes)
        torch.testing.assert_close(out.latents, theirs)
        torch.testing.assert_close(out.loss, their_loss.sum())
        torch.testing.assert_close(ours.codebook, oracle.codebook)


def test_the_codebook_rests_in_eval_mode():
    for update in ("gradient", "ema", "clustering"):
        quantizer = VectorQuantizer(QuantizerConfig(codebook_size=7, code_dim=3, update=update, kmeans_rounds=2)).eval()
        before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
        quantizer(torch.randn(31, 3))
        assert all(torch.equal(before[name], tensor) for name, tensor in quantizer.state_dict().items())


def test_kmeans_finds_separate_clusters_and_runs_once():
    latents = torch.tensor([[0.0, 0.0], [100.0, 0.0], [0.0, 100.0]])[:, None] + torch.randn(3, 50, 2)
    means = latents.mean(1)
    quantizer = VectorQuantizer(QuantizerConfig(codebook_size=3, code_dim=2, kmeans_rounds=10, ema_decay=0.999))
    # Lloyd's rounds find the three clusters from a start with one vector in each: look for a seed that draws one.
    starts = (seed for seed in range(100) if _drawn_clusters(seed) == {0, 1, 2})
    torch.manual_seed(next(starts))
    out = quantizer(latents.flatten(0, 1))
    torch.testing.assert_close(out.latents.view(3, 50, 2)[:, 0], means)
    assert quantizer.ema_counts.tolist() == pytest.approx([50, 50, 50])

    quantizer(latents.flatten(0, 1) + 50)
    # Moved by 0.1 % of the way, not started anew.
    assert (quantizer.codebook[:, None] - means).norm(dim=-1).amin(1).max() < 1


def _drawn_clusters(seed):
    torch.manual_seed(seed)
    return set((torch.randperm(150)[:3] // 50).tolist())


def test_kmeans_is_not_repeated_after_loading():
    config = QuantizerConfig(codebook_size=5, code_dim=3, kmeans_rounds=2, update="gradient")
    started, loaded = VectorQuantizer(config), VectorQuantizer(config)
    started(torch.randn(40, 3))
    loaded.load_state_dict(started.state_dict())
    loaded(torch.randn(40, 3) + 9)
    assert torch.equal(loaded.codebook, started.codebook)


def test_dead_entries_restart_on_latents_of_the_batch():
    torch.manual_seed(8)
    codebook = [[0.0, 0.0], [50.0, 50.0], [-50.0, 50.0]]
    quantizer = quantizer_with(codebook, ema_decay=0.5, restart_below=0.6)
    latents = torch.randn(20, 2)
    quantizer(latents)
    assert torch.isin(quantizer.codebook[1:], latents).all()
    torch.testing.assert_close(quantizer.ema_counts, torch.tensor([10.5, 0.6, 0.6]))
    torch.testing.assert_close(quantizer.ema_sums[1:], quantizer.codebook[1:] * 0.6)


@settings(max_examples=20)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=12), st.integers(0, 10**6))
def test_by_squared_distance_kmeans_gives_every_distinct_latent_an_entry_however_rare(copies, seed):
    points = torch.randn(len(copies), 5, generator=torch.Generator().manual_seed(seed))
    latents = points.repeat_interleave(torch.tensor(copies), dim=0)
    config = QuantizerConfig(codebook_size=len(copies), code_dim=5, kmeans_rounds=1, new_entries="squared_distance")
    torch.manual_seed(seed)
    out = VectorQuantizer(config)(latents)
    torch.testing.assert_close(out.latents, latents)


def test_by_squared_distance_a_dead_entry_parts_two_latents_that_shared_one():
    """Two rare latents, 2 apart, have one entry between them, and a thousand others one that fits exactly. The dead
    entries land on the rare ones, which an even draw would hit one time in 501."""
    torch.manual_seed(10)
    codebook = [[0.0, 0.0], [9.0, 1.0], [90.0, 0.0], [90.0, 0.0]]
    quantizer = quantizer_with(codebook, ema_decay=0.9, restart_below=0.5, new_entries="squared_distance")
    quantizer.ema_sums.copy_(quantizer.codebook)
    quantizer.ema_counts.copy_(torch.tensor([1000.0, 2.0, 0.0, 0.0]))
    quantizer.ema_sums.mul_(quantizer.ema_counts[:, None])
    rare = torch.tensor([[9.0, 0.0], [9.0, 2.0]])
    latents = torch.cat([torch.zeros(1000, 2), rare])
    quantizer(latents)
    assert torch.isin(quantizer.codebook[2:], rare).all()
    quantizer(latents)
    assert torch.equal(quantizer.encode(rare[:1]) == quantizer.encode(rare[1:]), torch.tensor([False]))


def test_dead_entries_restart_in_proportion_to_the_squared_distance():
    torch.manual_seed(11)
    K = 20_000
    config = QuantizerConfig(codebook_size=K, code_dim=1, restart_below=0.5, new_entries="squared_distance")
    quantizer = VectorQuantizer(config)
    quantizer.codebook.fill_(100.0)
    quantizer.codebook[0] = 0.0
    quantizer.ema_counts.zero_()
    quantizer(torch.tensor([[1.0], [2.0], [0.0], [-3.0]]))  # squared distances 1, 4, 0 and 9
    shares = [(quantizer.codebook == value).double().mean().item() for value in (1.0, 2.0, 0.0, -3.0)]
    assert shares == pytest.approx([1 / 14, 4 / 14, 0, 9 / 14], abs=0.02)  # six standard deviations


def test_where_every_latent_has_its_entry_restarts_are_even():
    torch.manual_seed(12)
    quantizer = quantizer_with([[1.0], [2.0], [90.0]], ema_decay=0.5, restart_below=0.6, new_entries="squared_distance")
    quantizer.ema_counts.zero_()
    latents = torch.tensor([[1.0], [1.0], [2.0], [2.0]])
    quantizer(latents)
    assert torch.isin(quantizer.codebook[2], latents).all()


@pytest.mark.parametrize(
    "remedy",
    [{"update": "ema", "ema_decay": 0.8, "restart_below": 0.5}, {"update": "clustering"}],
    ids=["restart", "clustering"],
)
def test_an_injected_collapse_recovers(remedy):
    """All entries but one are moved far away from all latents; usage must come back above 90 %."""
    torch.manual_seed(9)
    quantizer = VectorQuantizer(QuantizerConfig(codebook_size=64, code_dim=4, **remedy))
    quantizer.codebook.data[1:] += 1000
    if remedy["update"] == "ema":
        quantizer.ema_sums.copy_(quantizer.codebook)
    assert len(quantizer.encode(torch.randn(4096, 4)).unique()) == 1
    optimizer = torch.optim.SGD(list(quantizer.parameters()) or [nn.Parameter(torch.zeros(1))], lr=1.0)
    for _ in range(60):
        optimizer.zero_grad()
        quantizer(torch.randn(512, 4, requires_grad=True)).loss.backward()
        optimizer.step()
    health = CodebookHealth(64)
    health.update(quantizer.encode(torch.randn(4096, 4)))
    assert health.report().usage > 0.9


def test_clustering_leaves_used_entries_and_moves_idle_ones():
    quantizer = quantizer_with([[0.0, 0.0], [40.0, 0.0]], update="clustering")
    quantizer.running_usage.copy_(torch.tensor([0.9, 0.0]))
    quantizer(torch.tensor([[1.0, 0.0], [2.0, 0.0]]))
    # usage 0.901 and 0: pulls exp(-0.901 * 2 * 1000 - 0.001) = 0 and exp(-0.001) towards the closest latents
    expected = [[0.0, 0.0], [40 + (2 - 40) * math.exp(-1e-3), 0.0]]
    torch.testing.assert_close(quantizer.codebook.detach(), torch.tensor(expected))


# Two processes as one ------------------------------------------------------------------------------------------


CONFIGS = {
    "ema": QuantizerConfig(codebook_size=7, code_dim=3, kmeans_rounds=3, ema_decay=0.6, restart_below=1.5),
    "far": QuantizerConfig(
        codebook_size=7,
        code_dim=3,
        kmeans_rounds=3,
        ema_decay=0.6,
        restart_below=1.5,
        new_entries="squared_distance",
    ),
    # Without k-means, which leaves entries midway between two vectors of the batch: which one is closest is then a tie.
    "clustering": QuantizerConfig(codebook_size=7, code_dim=3, update="clustering"),
}


def learned(name, parts):
    """The state of the quantizer after five training steps on its share of each batch."""
    torch.manual_seed(12)
    quantizer = VectorQuantizer(CONFIGS[name])
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        batch = torch.randn(23, 3, generator=generator) * torch.tensor([1.0, 5.0, 0.2])
        quantizer(batch[parts])
    return quantizer.state_dict()


def process(rank, store, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(999 + rank)
    # Uneven shares: 11 and 12 vectors.
    states = {name: learned(name, slice(0, 11) if rank == 0 else slice(11, 23)) for name in CONFIGS}
    torch.save(states, f"{results}-{rank}")
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_two_processes_equal_one_on_the_joined_batch(tmp_path):
    mp.start_processes(process, args=(tmp_path / "store", tmp_path / "state"), nprocs=2, start_method="fork")
    for name in CONFIGS:
        alone = learned(name, slice(None))
        for rank in (0, 1):
            state = torch.load(f"{tmp_path / 'state'}-{rank}", weights_only=True)[name]
            for key, tensor in alone.items():
                torch.testing.assert_close(state[key], tensor)


# FSQ and LFQ ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [(8, 6, 5), (8, 5, 5, 5), (7, 5, 5, 5, 5), (2, 3)])
def test_fsq_code_to_point_to_code_is_the_identity_over_all_codes(levels):
    fsq = FiniteScalarQuantizer(FSQConfig(levels=levels))
    codes = torch.arange(fsq.codebook_size)
    assert fsq.codebook_size == math.prod(levels)
    points = fsq.lookup(codes)
    for axis, size in enumerate(levels):
        # every level is reached; even levels span -L/2 .. L/2-1 over floor(L/2)
        expected = (torch.arange(size) - size // 2) / (size // 2)
        torch.testing.assert_close(points[:, axis].unique(), expected)
    # the latent whose bounded value is the point: the inverse of the bounding
    half_range = (fsq.levels - 1) * 1.001 / 2
    offset = 0.5 * (fsq.levels % 2 == 0)
    latents = torch.atanh((points * (fsq.levels // 2) + offset) / half_range) - torch.atanh(offset / half_range)
    assert torch.equal(fsq.encode(latents), codes)
    assert torch.equal(fsq(latents).latents, points)


def test_fsq_equals_the_oracle():
    oracle = pytest.importorskip("vector_quantize_pytorch").FSQ([8, 5, 5, 5])
    torch.manual_seed(13)
    ours = torch.randn(3, 17, 4, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    given_gradient = torch.randn(3, 17, 4)
    fsq = FiniteScalarQuantizer(FSQConfig(levels=(8, 5, 5, 5)))
    out = fsq(3 * ours)
    their_latents, their_codes = oracle(3 * theirs)
    assert torch.equal(out.codes, their_codes.long()) and out.loss.item() == 0
    torch.testing.assert_close(out.latents, their_latents)
    out.latents.backward(given_gradient)
    their_latents.backward(given_gradient)
    assert ours.grad is not None and theirs.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_lfq_codes_by_hand_and_over_all_codes():
    lfq = LookupFreeQuantizer(LFQConfig(num_bits=3))
    assert lfq.encode(torch.tensor([[-1.0, 2.0, 0.5], [1.0, -3.0, 0.0]])).tolist() == [6, 1]
    assert lfq.lookup(torch.tensor([6])).tolist() == [[-1.0, 1.0, 1.0]]
    codes = torch.arange(8)
    assert torch.equal(lfq.encode(lfq.lookup(codes)), codes)


def test_lfq_equals_the_oracle():
    oracle_class = pytest.importorskip("vector_quantize_pytorch").LFQ
    torch.manual_seed(14)
    oracle = oracle_class(
        dim=5, codebook_size=32, entropy_loss_weight=0.1, commitment_loss_weight=0.25, diversity_gamma=1.5
    )
    lfq = LookupFreeQuantizer(LFQConfig(num_bits=5, diversity=1.5, inverse_temperature=2.0)).train()
    ours = (torch.randn(3, 17, 5) * 0.3).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    out = lfq(ours)
    their_latents, their_codes, their_loss = oracle(theirs, inv_temperature=2.0)
    torch.testing.assert_close(out.latents, their_latents)
    # their first number is the highest bit, ours the lowest
    flipped = sum(((their_codes >> bit) & 1) << (4 - bit) for bit in range(5))
    assert torch.equal(out.codes, flipped)
    torch.testing.assert_close(out.loss, their_loss)
    out.loss.backward()
    their_loss.backward()
    assert ours.grad is not None and theirs.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4)


# Configs, errors, health ---------------------------------------------------------------------------------------


def test_make_quantizer_follows_the_config():
    for config, kind in (
        (QuantizerConfig(codebook_size=3, code_dim=2), VectorQuantizer),
        (IBQConfig(codebook_size=3, code_dim=2), IndexBackpropagationQuantizer),
        (FSQConfig(levels=(3, 5)), FiniteScalarQuantizer),
        (LFQConfig(num_bits=4), LookupFreeQuantizer),
    ):
        quantizer = make_quantizer(config)
        assert type(quantizer) is kind and quantizer.codebook_size == config.codebook_size
        assert quantizer(torch.randn(2, 7, config.code_dim)).latents.shape == (2, 7, config.code_dim)


@pytest.mark.parametrize("config", [QuantizerConfig(codebook_size=5, code_dim=2), FSQConfig(levels=(5,)), LFQConfig()])
@pytest.mark.parametrize("wrong", [-1, 1024])
def test_a_code_outside_the_codebook_is_refused(config, wrong):
    with pytest.raises(ValueError, match=rf"code {wrong} is outside the codebook: codes lie in 0\.\."):
        make_quantizer(config).lookup(torch.tensor([0, wrong]))


@pytest.mark.parametrize(
    ("given_settings", "message"),
    [
        ({"codebook_size": 0}, "codebook_size is 0; it must be at least 1"),
        ({"update": "adam"}, 'update is .adam.; use "gradient", "ema" or "clustering"'),
        ({"ema_decay": 1.0}, "ema_decay is 1.0; it must lie between 0 and 1"),
        ({"update": "gradient", "restart_below": 1.0}, 'restart_below needs update "ema"'),
        ({"new_entries": "far", "kmeans_rounds": 1}, 'new_entries is .far.; use "squared_distance"'),
        ({"new_entries": "squared_distance"}, "set one of them above 0"),
        ({"entropy_temperature": 0.0}, "entropy_temperature is 0.0; it must be above 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(given_settings, message):
    with pytest.raises(ValueError, match=message):
        QuantizerConfig(**given_settings)
    with pytest.raises(ValueError, match="at least one number, each at least 2"):
        FSQConfig(levels=(5, 1))


def test_health_of_a_case_worked_by_hand():
    health = CodebookHealth(5)
    with pytest.raises(ValueError, match="no codes were seen yet"):
        health.report()
    health.update(torch.tensor([[0, 0], [1, 1]]))
    report = health.report()
    assert report.usage == 0.4 and report.dead_codes == 3 and report.num_codes == 4
    assert report.perplexity == pytest.approx(2.0)


@given(st.lists(st.lists(st.integers(0, 6), max_size=9), min_size=1, max_size=9), st.integers(1, 12))
def test_health_looks_at_exactly_the_last_codes(updates, window):
    health = CodebookHealth(7, window=window)
    for codes in updates:
        health.update(torch.tensor(codes, dtype=torch.long))
    last = [code for codes in updates for code in codes][-window:]
    if not last:
        return
    report = health.report()
    shares = [last.count(code) / len(last) for code in set(last)]
    assert report.num_codes == len(last) and report.dead_codes == 7 - len(set(last))
    assert report.perplexity == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)))


def test_lower_floor_of_perplexity_grows_with_even_use():
    perplexities = []
    for used in (1, 3, 7):
        health = CodebookHealth(7)
        health.update(torch.arange(21) % used)
        perplexities.append(health.report().perplexity)
    assert all(less < more for less, more in pairwise(perplexities))
    assert perplexities == pytest.approx([1, 3, 7])
