"""Checkpoints: exact, atomic, the last k kept, and clear errors before and while work is saved."""

import io
import os
import random
import signal
import time

import numpy as np
import pytest
import safetensors.torch
import torch

from smalti.errors import InputError
from smalti.training import checkpoint
from smalti.training.checkpoint import (
    check_writable,
    latest_checkpoint,
    load_checkpoint,
    random_state,
    save_checkpoint,
    set_random_state,
)


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_what_is_saved_is_read_back_bit_for_bit(tmp_path):
    layer = torch.nn.Linear(3, 5)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.randn(7, 3)).sum().backward()
    optimizer.step()
    state = {"optimizer": optimizer.state_dict(), "best": 0.25, "names": ["a", "b"], "random": random_state()}

    path = save_checkpoint(tmp_path, 1200, layer.state_dict(), state)
    assert path.name == "step_00001200"
    read = load_checkpoint(path)

    assert read.step == 1200
    assert read.weights.keys() == layer.state_dict().keys()
    assert all(torch.equal(read.weights[name], tensor) for name, tensor in layer.state_dict().items())
    assert read.training_state["best"] == 0.25 and read.training_state["names"] == ["a", "b"]
    moments = read.training_state["optimizer"]["state"][0]
    assert torch.equal(moments["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])


def test_tied_weights_are_written_under_both_names(tmp_path):
    shared = torch.randn(5, 3)
    weights = load_checkpoint(save_checkpoint(tmp_path, 1, {"a": shared, "b": shared, "c": shared.t()}, {})).weights
    assert torch.equal(weights["a"], shared) and torch.equal(weights["b"], shared)
    assert torch.equal(weights["c"], shared.t())


def test_the_last_k_are_kept_by_step_not_by_name_or_time(tmp_path):
    for step in (3, 100_000_001, 20, 7):
        save_checkpoint(tmp_path, step, {"w": torch.tensor([step])}, {}, keep=3)
    assert names(tmp_path) == ["step_00000007", "step_00000020", "step_100000001"]
    latest = latest_checkpoint(tmp_path)
    assert latest is not None and load_checkpoint(latest).step == 100_000_001


def test_saving_a_step_again_replaces_it(tmp_path):
    save_checkpoint(tmp_path, 2, {"w": torch.zeros(3)}, {"round": 1})
    path = save_checkpoint(tmp_path, 2, {"w": torch.ones(3)}, {"round": 2})
    assert load_checkpoint(path).training_state == {"round": 2}
    assert names(tmp_path) == ["step_00000002"]


def test_no_checkpoint_is_none(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "missing") is None


@pytest.mark.parametrize("stage", ["save_file", "torch_save", "rename"])
def test_a_save_that_fails_midway_leaves_the_last_complete_one(tmp_path, monkeypatch, stage):
    save_checkpoint(tmp_path, 1, {"w": torch.zeros(3)}, {})

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    target, name = {
        "save_file": (safetensors.torch, "save_file"),
        "torch_save": (torch, "save"),
        "rename": (checkpoint.os, "rename"),
    }[stage]
    monkeypatch.setattr(target, name, full)
    with pytest.raises(InputError, match=r"step 2 .*No space left on device; the run can go on from step_00000001"):
        save_checkpoint(tmp_path, 2, {"w": torch.ones(3)}, {})
    monkeypatch.undo()
    latest = latest_checkpoint(tmp_path)
    assert latest is not None and latest.name == "step_00000001"
    assert names(tmp_path) == ["step_00000001"]


def test_a_disk_that_is_really_full_is_reported(tmp_path, monkeypatch):
    """The state is written to /dev/full, which refuses every byte as a full disk does."""
    if not os.path.exists("/dev/full"):
        pytest.skip("/dev/full is a Linux device")
    monkeypatch.setattr(checkpoint, "STATE_FILE", "/dev/full")
    with pytest.raises(InputError, match=r"step 5 .*; there is no earlier checkpoint\. Free some space"):
        save_checkpoint(tmp_path, 5, {"w": torch.ones(3)}, {"w": torch.zeros(100_000)})
    assert names(tmp_path) == []


def forked_saver(directory, step: int) -> tuple[int, io.TextIOBase]:
    """A process that saves without end: its id, and where it writes down each step that is saved."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            while True:
                step += 1
                save_checkpoint(directory, step, {"w": torch.full((300_000,), step)}, {"step": step}, keep=2)
                os.write(writing, f"{step}\n".encode())
        finally:
            os._exit(1)
    os.close(writing)
    return child, os.fdopen(reading)


def test_kill_at_any_moment_leaves_a_complete_checkpoint(tmp_path):
    """A process that does nothing but save is killed at uneven moments: what is left must always read back
    whole."""
    moments = random.Random(5)
    last = 0
    for _ in range(3):
        child, saved = forked_saver(tmp_path, last)
        with saved:
            assert saved.readline()
            time.sleep(moments.uniform(0, 0.1))
            os.kill(child, signal.SIGKILL)
            printed = saved.read().split()
        os.waitpid(child, 0)
        latest = latest_checkpoint(tmp_path)
        assert latest is not None
        read = load_checkpoint(latest)
        assert read.step == read.training_state["step"] and bool((read.weights["w"] == read.step).all())
        assert read.step >= max([last, *map(int, printed)])
        last = read.step
        check_writable(tmp_path)
        assert all(name.startswith("step_") for name in names(tmp_path))


def test_probe_refuses_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"file/run: .*file is a file, not a folder; choose a folder"):
        check_writable(tmp_path / "file" / "run")


def test_probe_refuses_too_little_space(tmp_path):
    with pytest.raises(InputError, match=r"MB free, but the checkpoints of this run need about 1,000,000,000,000 MB"):
        check_writable(tmp_path, expected_bytes=10**18)


@pytest.mark.parametrize("file", ["model.safetensors", "training_state.pt"])
def test_a_truncated_file_is_named(tmp_path, file):
    path = save_checkpoint(tmp_path, 4, {"w": torch.zeros(1000)}, {"w": torch.zeros(1000)})
    content = (path / file).read_bytes()
    (path / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=rf"{file}.*remove the folder"):
        load_checkpoint(path)


def test_a_state_that_would_run_code_is_refused(tmp_path):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    path = save_checkpoint(tmp_path, 4, {"w": torch.zeros(1)}, {})
    torch.save({"x": Malicious()}, path / "training_state.pt")
    with pytest.raises(InputError, match=r"training_state\.pt"):
        load_checkpoint(path)
    assert not (tmp_path / "ran").exists()


def test_not_a_checkpoint_and_keep_zero(tmp_path):
    with pytest.raises(InputError, match="expected a folder with a name such as step_00001200"):
        load_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="keep is 0; at least 1"):
        save_checkpoint(tmp_path, 1, {}, {}, keep=0)


def test_random_state_round_trip_repeats_every_generator(tmp_path):
    def draw():
        return random.random(), random.gauss(0, 1), np.random.standard_normal(), float(torch.randn(()))

    draw()  # leaves a cached gaussian behind in Python's and NumPy's generators
    path = save_checkpoint(tmp_path, 1, {}, random_state())
    first = [draw(), draw()]
    set_random_state(load_checkpoint(path).training_state)
    assert [draw(), draw()] == first
