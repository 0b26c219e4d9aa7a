"""Damaged inputs for every reader, counted: `make fuzz`, or `python tests/fuzz/run.py --readers recipe,torch`.

Each reader runs in a process of its own, so that an abort of a library or a hang is found as well as an exception. An
input is named by reader, seed and number and made from them alone. Found is: an exception other than InputError, more
than 10 seconds of processor time, more than 2 GiB beyond what the process had before it, or the end of the process.
Each find is saved as the damaged file beside a text that says what happened and how to see it again.
"""

import argparse
import contextlib
import gc
import io
import mmap
import multiprocessing
import os
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from random import Random
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

HANG_S = 10
"""Of processor time."""
STUCK_S = 60
"""By the clock, for what waits without working or never comes back from a library."""
MEMORY_BYTES = 2 * 2**30
STATE = struct.Struct("<qqq")  # number of the input on its way, inputs done, inputs that were accepted
IN_MEMORY = "/dev/shm"
"""Where temporary files cost no disk, if there is such a place and TMPDIR does not say otherwise."""


class Hang(BaseException):
    """An input took longer than HANG_S."""


def _alarm(*_: object) -> None:
    raise Hang


def make_input(reader: str, samples: list[bytes], mutate, seed: int, number: int) -> bytes:
    random = Random(f"{reader} {seed} {number}")
    return mutate(random, random.choice(samples))


def work(reader: str, seed: int, start: int, stop: int, until: float, shared: Path, finds: Path) -> None:
    """Runs the inputs `start` up to `stop`, or until the clock says `until`, in a folder of its own."""
    from readers import READERS

    from smalti.errors import InputError

    warnings.simplefilter("ignore")
    found = READERS[reader]
    signal.signal(signal.SIGPROF, _alarm)
    seen: set[str] = set()
    state = mmap.mmap(os.open(shared, os.O_RDWR), STATE.size)
    with tempfile.TemporaryDirectory(prefix="smalti-fuzz-") as name:
        folder = Path(name).resolve()
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        os.chdir(folder)
        samples = found.samples(folder)
        num_done, num_accepted = STATE.unpack(state[:])[1:]
        for number in range(start, stop):
            if time.monotonic() > until:
                break
            STATE.pack_into(state, 0, number, num_done, num_accepted)
            content = make_input(reader, samples, found.mutate, seed, number)
            _bound_memory()
            problem = None
            signal.setitimer(signal.ITIMER_PROF, HANG_S)
            output = io.StringIO()
            try:
                with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                    found.read(folder, content)
                num_accepted += 1
            except InputError as error:
                if _ran_out(error) and _runs_out_again(found, folder, content):
                    problem = f"memory: {_ran_out(error)!r}"
                    trace = traceback.format_exc()
                elif len(str(error)) > 2000:
                    problem, trace = f"a message of {len(str(error))} characters", traceback.format_exc()
            except Hang:
                problem, trace = f"longer than {HANG_S} s", traceback.format_exc()
            except BaseException as error:
                problem, trace = f"{type(error).__name__}: {str(error)[:300]}", traceback.format_exc()
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
            num_done += 1
            if problem is not None and (place := _place(problem, trace)) not in seen:
                seen.add(place)
                save_find(finds, reader, seed, number, content, problem, trace)
        STATE.pack_into(state, 0, -1, num_done, num_accepted)


def _bound_memory() -> None:
    """Of the next input: what inputs before it have left mapped, touched or not, does not count."""
    if sys.platform == "linux":
        virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (virtual + MEMORY_BYTES, hard))


def _runs_out_again(found: Any, folder: Path, content: bytes) -> bool:
    """By itself, behind what inputs before it have left in memory."""
    from smalti.errors import InputError

    gc.collect()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            found.read(folder, content)
    except InputError as error:
        return _ran_out(error) is not None
    return False


def _ran_out(error: BaseException) -> BaseException | None:
    """The want of memory that an error was made of."""
    while error is not None:
        if isinstance(error, MemoryError) or re.search(r"can't allocate|bad_alloc|malloc of size", str(error)):
            return error
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return None


def _place(problem: str, trace: str) -> str:
    """What tells finds apart: the kind of the problem and the last lines of the program that it passed."""
    lines = re.findall(r'File "[^"]*?((?:src/smalti|fuzz)/[^"]*)", line (\d+)', trace)
    return problem.partition(":")[0] + " ".join(":".join(line) for line in lines[-2:])


def save_find(finds: Path, reader: str, seed: int, number: int, content: bytes, problem: str, trace: str) -> None:
    finds.mkdir(parents=True, exist_ok=True)
    name = f"{reader.replace(' ', '_')}-{seed}-{number}"
    (finds / f"{name}.bin").write_bytes(content[: 2**20])
    again = f"python tests/fuzz/run.py --readers '{reader}' --seed {seed} --only {number}"
    (finds / f"{name}.txt").write_text(f"{problem}\n\n{again}\n\n{trace[-6000:]}", errors="backslashreplace")


def run_reader(reader: str, seed: int, start: int, stop: int, seconds: float, finds: Path) -> tuple[int, int, int]:
    """Inputs done, accepted, and finds; a process that ends is started again behind the input that ended it."""
    before = len(list(finds.glob(f"{reader.replace(' ', '_')}-*.txt"))) if finds.exists() else 0
    context = multiprocessing.get_context("fork")  # which finds the package imported
    with tempfile.NamedTemporaryFile() as shared:
        shared.write(STATE.pack(start, 0, 0))
        shared.flush()
        until = time.monotonic() + seconds
        while start < stop and time.monotonic() < until:
            process = context.Process(target=work, args=(reader, seed, start, stop, until, Path(shared.name), finds))
            process.start()
            last, changed = b"", time.monotonic()
            while process.is_alive():
                process.join(0.2)
                # Compared only: the other process may be writing it.
                if (state := Path(shared.name).read_bytes()) != last:
                    last, changed = state, time.monotonic()
                elif time.monotonic() - changed > STUCK_S * (1 if any(last[8:]) else 3):
                    process.kill()
                    process.join()
            number, done, accepted = STATE.unpack(Path(shared.name).read_bytes())
            if number < 0:
                break
            _save_end(reader, seed, number, process.exitcode, finds)
            done += 1
            start = number + 1
            Path(shared.name).write_bytes(STATE.pack(start, done, accepted))
    after = len(list(finds.glob(f"{reader.replace(' ', '_')}-*.txt"))) if finds.exists() else 0
    return done, accepted, after - before


def _save_end(reader: str, seed: int, number: int, code: int | None, finds: Path) -> None:
    from readers import READERS

    with tempfile.TemporaryDirectory() as folder:
        samples = READERS[reader].samples(Path(folder).resolve())
        content = make_input(reader, samples, READERS[reader].mutate, seed, number)
    how = f"killed after {STUCK_S} s" if code == -signal.SIGKILL else f"exit code {code}"
    save_find(finds, reader, seed, number, content, f"the process ended: {how}", "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600, help="for all readers together")
    parser.add_argument("--inputs", type=int, help="so many for each reader instead")
    parser.add_argument("--readers", help="their names, with commas between (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="number of the first input")
    parser.add_argument("--only", type=int, help="this one input")
    parser.add_argument("--finds", type=Path, default=Path("out/fuzz"))
    options = parser.parse_args()
    os.environ["SMALTI_NATIVE"] = "0"
    if "TMPDIR" not in os.environ and os.access(IN_MEMORY, os.W_OK):
        tempfile.tempdir = IN_MEMORY
    import torch
    from readers import READERS

    torch.set_num_threads(1)
    names = options.readers.split(",") if options.readers else list(READERS)
    shares = sum(READERS[name].share for name in names)
    total = num_finds = 0
    for name in names:
        start, stop, seconds = options.start, 2**40, options.seconds * READERS[name].share / shares
        if options.inputs:
            stop, seconds = start + options.inputs, 10_000.0
        if options.only is not None:
            start, stop = options.only, options.only + 1
        began = time.perf_counter()
        done, accepted, found = run_reader(name, options.seed, start, stop, seconds, options.finds)
        total, num_finds = total + done, num_finds + found
        print(f"{name:22} {done:9,} inputs {accepted:9,} accepted {found:4} finds {time.perf_counter() - began:6.0f} s")
        sys.stdout.flush()
    print(f"{'all':22} {total:9,} inputs {num_finds:4} finds" + (f", in {options.finds}" if num_finds else ""))
    shutil.rmtree(options.finds, ignore_errors=True) if not num_finds and options.only is None else None
    return 1 if num_finds else 0


if __name__ == "__main__":
    sys.exit(main())
