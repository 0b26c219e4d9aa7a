"""Weights in shares (FSDP2, tensor parallel): the run of one process, whatever number of them it goes on with."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from training_runs import FIXED, STEPS, arrays

from smalti.training.checkpoint import load_checkpoint
from smalti.training.distributed import Processes, make_processes
from smalti.training.token_model import TrainConfig, micro_batches


def run(name: str, directory: Path) -> str:
    script = Path(__file__).with_name("training_runs.py")
    done = subprocess.run(
        [sys.executable, str(script), name, str(directory)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, str]:
    directory = tmp_path_factory.mktemp("sharded")
    return directory, run("sharded", directory)


def losses(directory: Path) -> dict[tuple[str, str], float]:
    with (directory / "curves.csv").open() as file:
        return {(row["split"], row["step"]): float(row["nats_per_token"]) for row in csv.DictReader(file)}


def assert_alike(one: Path, other: Path) -> None:
    expected, found = losses(one), losses(other)
    assert expected.keys() == found.keys() and len(expected) > STEPS.num_steps
    assert max(abs(expected[key] - found[key]) for key in expected) < 1e-6
    weights, same = torch.load(one / "final.pt"), torch.load(other / "final.pt")
    assert weights.keys() == same.keys()
    for name, tensor in weights.items():
        assert torch.allclose(tensor, same[name], atol=1e-5), name


def test_two_processes_then_four_then_one_train_as_one(runs):
    directory, _ = runs
    assert_alike(directory / "one", directory / "many")


def test_a_killed_process_ends_the_others_with_a_message_and_the_run_goes_on(runs):
    directory, report = runs
    assert "killed [2, -9]" in report
    assert "process 0 of 2 ends, since another one does not answer any more" in report
    assert "The run goes on from step_00000005. Start the same command again" in report
    assert_alike(directory / "one", directory / "killed")


def test_a_checkpoint_of_shares_is_safetensors_and_its_damage_is_named(runs):
    directory, _ = runs
    newest = directory / "killed/checkpoints/step_00000020"
    files = sorted((newest / "shards").iterdir())
    assert len(files) == 2 and all(file.suffix == ".safetensors" for file in files)
    names = set()
    for file in files:
        with safe_open(file, "pt") as opened:
            names |= set(opened.keys())
    assert {"model.transformer.blocks.0.attention.qkv.q.weight", "average.embed_tokens.weight"} <= names
    assert "optimizer.transformer.blocks.1.feed_forward.up.gate.weight.exp_avg_sq" in names
    assert set(json.loads((newest / "checksums.json").read_text())) == {
        "training_state.pt", *(f"shards/{file.name}" for file in files)
    }  # fmt: skip
    content = bytearray(files[0].read_bytes())
    content[-1] ^= 1
    files[0].write_bytes(content)
    with pytest.raises(ValueError, match=f"{files[0].name} is damaged"):
        load_checkpoint(newest)


@pytest.mark.slow
def test_families_go_on_in_shares_of_layers_from_a_plain_checkpoint(tmp_path):
    run("sharded_families", tmp_path)
    for name in ("rar", "gpt", "parti"):
        assert_alike(tmp_path / f"{name}-one", tmp_path / f"{name}-many")


@pytest.mark.parametrize("step", [0, 3, 11])
def test_rows_of_a_step_are_the_same_for_any_number_of_processes(step):
    """29 rows in batches of 8: step 3 reaches over the end of the epoch."""
    found = []
    for size in (1, 2, 4):
        pieces = []
        for rank in range(size):
            config = TrainConfig(num_steps=20, batch_size=8, token_dropout=0.3)
            stream = micro_batches(FIXED, arrays(29), config, start_step=step, rank=rank, world_size=size)
            (piece,) = next(stream)
            pieces.append(piece.token_ids)
        rows = torch.empty(8, pieces[0].shape[1], dtype=torch.long)
        for rank, piece in enumerate(pieces):
            rows[rank::size] = piece
        found.append(rows)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_processes_that_cannot_be_divided_are_refused():
    with pytest.raises(ValueError, match=r"tensor_parallel is 3, and there are 4 processes.*nproc-per-node 6"):
        make_processes(0, 4, torch.device("cpu"), sharding="full", tensor_parallel=3)
    with pytest.raises(ValueError, match="muon, which looks at whole matrices"):
        TrainConfig(num_steps=1, optimizer="muon", sharding="full")
    assert make_processes(0, 1, torch.device("cpu"), sharding="full", tensor_parallel=2) == Processes()
