"""What `smalti plan` says of a training here, beside what the training takes: peak memory and the time of a step.

    python benchmarks/plan_accuracy.py [--quick] [--threads 1] [--memory] [--processor] [--only NAME]

Each training is a process of its own: a tiny one first, so that all is loaded, then the one that is measured, with its
first evaluation. Its memory is the most that was resident, less what was before it. The plan is made in another
process, right before. Memory is measured twice: with glibc told to give back what is freed (MALLOC_MMAP_THRESHOLD_),
which is what the training needs and the plan tells, and as it is by itself, "kept": an aligned block cannot be taken
again for a tensor of the same size, so that much lies between tensors. Rates of a machine that others use are rough,
memory is not: `--processor` compares processor time, which is the clock's on one thread of a machine that nobody else
uses. `--quick` makes fewer steps; `--memory` leaves times out; `--only` takes the trainings whose name holds
NAME.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

WITHIN = 0.15
NATIVE = {"SMALTI_NATIVE": "1"}
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}
"""Below the activations of a few rows: at 1 MiB LlamaGen-B's, 0.8 MB each, stay in a heap that does not shrink."""


def tasks() -> dict[str, tuple[Any, dict[str, str]]]:
    """The trainings: a task, and what the environment says."""
    from smalti.models.config import LLAMAGEN, TransformerConfig, preset_config
    from smalti.models.encoder_decoder import preset_config as parti
    from smalti.planning.footprint import Task
    from smalti.sequences.layout import Layout
    from smalti.sequences.vocabulary import Vocabulary
    from smalti.training.token_model import TrainConfig

    layout = Layout.parse(Vocabulary({"image": 4096, "label": 1001}), {"class": "label{1} image{256}"})
    small = TransformerConfig(
        num_layers=6, d_model=256, num_heads=4, d_ff=704, max_length=257, grid=(16, 16), prefix_length=1, **LLAMAGEN
    )
    base = preset_config("llamagen-b", max_length=257, grid=(16, 16), prefix_length=1)
    text = parti("parti-4m", text_size=16_000, max_text=64, codebook_size=8192, grid=(16, 16))
    train = TrainConfig(num_steps=8, batch_size=8, precision="float32", compile=False, evaluation_rows=8)
    more = replace(train, batch_size=16, recompute=True, ema_decay=0.99, num_micro_batches=2)
    plain = {"SMALTI_NATIVE": "0"}
    return {
        "6 layers of 256, the native kernel": (Task(small, layout, replace(train, num_steps=100_000)), NATIVE),
        "6 layers of 256, operators": (Task(small, layout, train), plain),
        "the same, recompute, average, 2 micro-batches": (Task(small, layout, more), plain),
        "LlamaGen-B, a row": (Task(base, layout, replace(train, batch_size=1)), plain),
        "Parti, 4 M in blocks, bfloat16": (
            Task(text, text.layout, replace(train, precision="bfloat16", batch_size=4)),
            plain,
        ),
    }


def resident(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * float(line.split()[1])
    raise RuntimeError(f"no {field} in /proc/self/status")


def pairs(task: Any, num_rows: int) -> Any:
    """Rows of full length."""
    import numpy as np

    from smalti.training.token_model import TokenArrays

    spans = {span.segment: span.length for order in task.layout.orders.values() for span in order.spans}
    text = spans.get("text", spans.get("label", 0))
    return TokenArrays(np.zeros((num_rows, spans["image"]), np.int64), np.zeros((num_rows, text), np.int64))


def measure(name: str, num_steps: int, clock: Callable[[], float]) -> dict[str, float]:
    """Bytes and seconds of a training, in this process."""
    from smalti.models.encoder_decoder import EncoderDecoderConfig
    from smalti.training import token_model

    task, _ = tasks()[name]
    took: list[float] = []
    real = token_model.train_step

    def timed(*given: Any, **more: Any) -> Any:
        started_at = clock()
        found = real(*given, **more)
        took.append(clock() - started_at)
        if len(took) == num_steps:
            raise KeyboardInterrupt  # the rest of a long training is like these
        return found

    def run(task: Any, folder: str) -> None:
        data = pairs(task, 64)
        token_model.train_model(task.shape, task.layout, data, data, task.train, folder, show_progress=False)

    narrow: dict[str, Any] = {"d_model": 32, "num_heads": 2, "d_ff": 32}
    is_parti = isinstance(task.shape, EncoderDecoderConfig)
    depth = {"encoder_layers": 1, "decoder_layers": 1} if is_parti else {"num_layers": 1}
    tiny = task._replace(
        shape=replace(task.shape, **narrow, **depth),
        train=replace(task.train, num_steps=2, num_epochs=None, batch_size=2, num_micro_batches=1, evaluation_rows=2),
    )
    with tempfile.TemporaryDirectory() as folder:
        run(tiny, f"{folder}/tiny")
        token_model.train_step = timed
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        long = task.train.num_steps or 0
        with suppress(KeyboardInterrupt):
            run(task._replace(train=replace(task.train, num_steps=max(long, num_steps))), f"{folder}/whole")
        return {"bytes": resident("VmHWM") - before, "step_s": statistics.median(took[1:])}


def plan(name: str, memory_alone: bool, clock: Callable[[], float]) -> dict[str, float]:
    from smalti.planning import plan as planning
    from smalti.planning import probe
    from smalti.planning.plan import make_plan
    from smalti.planning.probe import Trained
    from smalti.planning.subjects import Subject

    task, environment = tasks()[name]
    if memory_alone and environment != NATIVE:  # what the kernel holds is found by running it
        planning.probe_training = lambda task, *_: Trained(float("nan"), None, task.train.precision)
    probe.time = SimpleNamespace(perf_counter=clock)  # pyright: ignore
    planning.probe_drawing = lambda *_, **__: None
    found = make_plan(Subject(name, task, 64, False, []), gpus=[], measure=True).here
    assert found is not None
    return {"bytes": found.peak_bytes, "step_s": found.step_s}


def in_child(what: str, name: str, environment: dict[str, str], arguments: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--do", what, "--name", name, *(["--quick"] if arguments.quick else [])]
    command += ["--memory"] if arguments.memory else []
    command += ["--processor"] if arguments.processor else []
    threads = str(arguments.threads)
    done = subprocess.run(
        command, env=os.environ | environment | {"OMP_NUM_THREADS": threads}, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--processor", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--do", choices=("measure", "plan"), help=argparse.SUPPRESS)
    parser.add_argument("--name", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.processor and given.threads > 1:
        parser.error("--processor is of one thread")
    if given.do:
        num_steps = 2 if given.memory else 4 if given.quick else 12
        clock = time.thread_time if given.processor else time.perf_counter
        found = plan(given.name, given.memory, clock) if given.do == "plan" else measure(given.name, num_steps, clock)
        print(json.dumps(found))
        return
    print(f"{'':48} {'planned':>10} {'measured':>10} {'':>6} {'kept':>10} {'planned':>10} {'measured':>10}")
    for name, (_, environment) in tasks().items():
        if given.only not in name:
            continue
        planned, kept = (in_child(what, name, environment, given) for what in ("plan", "measure"))
        needed = in_child("measure", name, environment | GIVES_BACK, given)
        memory, step = planned["bytes"] / needed["bytes"] - 1, planned["step_s"] / kept["step_s"] - 1
        megabytes = [f"{found['bytes'] / 1e6:7.0f} MB" for found in (planned, needed, kept)]
        line = f"{name:48} {megabytes[0]} {megabytes[1]} {memory:+6.1%} {megabytes[2]}"
        if not given.memory:
            line += f" {planned['step_s'] * 1e3:7.0f} ms {kept['step_s'] * 1e3:7.0f} ms {step:+6.1%}"
        beyond = {"memory": memory, "time": 0.0 if given.memory else step}
        wrong = [what for what, off in beyond.items() if abs(off) > WITHIN]
        print(line + (f"   {' and '.join(wrong)} beyond {WITHIN:.0%}" if wrong else ""), flush=True)


if __name__ == "__main__":
    main()
