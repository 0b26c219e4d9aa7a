"""Parts on a Ray cluster of one machine: the table of one process, though actors are killed on the way."""

import os
import signal
import time
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq
import pytest
from test_tokenize import NUM, PICTURES, SMALL_PARTS, image_tokenizer, png, tokenizers, write_parquet  # noqa: F401

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'smalti[ray]'")
pytest.importorskip("ray.data", reason="ray is without Data: pip install 'smalti[ray]'")

from dataclasses import replace  # noqa: E402

from smalti.data import parts as parts_module  # noqa: E402
from smalti.data.ray_parts import do_parts_on_ray  # noqa: E402
from smalti.data.tokenize_pairs import tokenize_pairs  # noqa: E402
from smalti.data.tokens import SCHEMA  # noqa: E402
from smalti.errors import InputError  # noqa: E402

pytestmark = [
    pytest.mark.slow,  # a cluster starts in some ten seconds
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of Ray Data, of its own settings
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def cluster():
    code = str(Path(__file__).parent)
    ray.init(
        num_cpus=3,
        include_dashboard=False,
        logging_level="ERROR",
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join([code, os.environ.get("PYTHONPATH", "")])}},
    )
    yield
    ray.shutdown()


class KilledJob(NamedTuple):
    """A job whose process is killed at every third part, before or behind its work, the first time."""

    job: object
    folder: Path

    def file(self, part: int) -> Path:
        return self.job.file(part)

    def do(self, part: int) -> None:
        mark = self.folder / f"killed-{part}"
        first = part % 3 == 0 and not mark.exists()
        mark.touch()
        if first and part % 2:
            os.kill(os.getpid(), signal.SIGKILL)
        self.job.do(part)
        with (self.folder / f"done-{part}").open("a") as file:
            file.write("x")
        if first:
            os.kill(os.getpid(), signal.SIGKILL)


class Sleeping(NamedTuple):
    folder: Path
    seconds: float = 0.0

    def file(self, part: int) -> Path:
        return self.folder / str(part)

    def do(self, part: int) -> None:
        time.sleep(self.seconds)
        if part == 1:
            raise InputError("p04: the picture is broken")
        self.file(part).touch()


def test_killed_actors_leave_the_table_of_one_process(cluster, tokenizers, tmp_path, monkeypatch):  # noqa: F811
    pairs = write_parquet(tmp_path / "pairs.parquet", [png(picture) for picture in PICTURES])
    plain, output = tmp_path / "plain.parquet", tmp_path / "tokens.parquet"
    tokenize_pairs(pairs, plain, *tokenizers, SMALL_PARTS, show_progress=False)
    real = parts_module.do_parts
    monkeypatch.setattr(
        "smalti.data.tokenize_pairs.do_parts", lambda job, *rest, **how: real(KilledJob(job, tmp_path), *rest, **how)
    )
    config = replace(SMALL_PARTS, ray=True, workers=2)
    assert tokenize_pairs(pairs, output, *tokenizers, config, show_progress=False).num_rows == NUM
    found, expected = pq.read_table(output), pq.read_table(plain)
    assert found.schema.equals(SCHEMA) and found.equals(expected)
    assert (tmp_path / "killed-0").exists() and (tmp_path / "killed-3").exists()
    assert all((tmp_path / f"done-{part}").read_text() == "x" for part in range(5))  # none was done twice


def test_what_an_actor_cannot_do_is_told(cluster, tmp_path):
    with pytest.raises(ValueError, match="p04: the picture is broken"):
        list(do_parts_on_ray(Sleeping(tmp_path), [0, 1, 2], actors=1, cpus=1))


def test_a_job_that_does_not_fit_is_refused(cluster, tmp_path):
    with pytest.raises(ValueError, match=r"4 actors of 1 CPUs do not fit a cluster of 3.*--workers 3 or fewer"):
        list(do_parts_on_ray(Sleeping(tmp_path), [0], actors=4, cpus=1))


def test_a_job_without_an_end_says_what_it_waits_for(cluster, tmp_path):
    waiting = do_parts_on_ray(Sleeping(tmp_path, 60), [0], actors=1, cpus=2, deadline_s=3)
    with pytest.raises(
        ValueError, match=r"no part was finished for 3 s: 1 actors want 2 CPUs each, and .* of the clus"
    ):
        list(waiting)
