"""Parts on a Ray cluster of one machine: the table of one process, though actors are killed on the way."""

import os
import signal
import time
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq
import pytest
import torch

ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'smalti[ray]'")
pytest.importorskip("ray.data", reason="ray is without Data: pip install 'smalti[ray]'")

from smalti.data import tokenize_pairs as tokenizing  # noqa: E402
from smalti.data.pairs import PairTable, write_pairs  # noqa: E402
from smalti.data.ray_parts import do_parts_on_ray  # noqa: E402
from smalti.data.tokenize_pairs import TokenizeConfig, tokenize_pairs  # noqa: E402
from smalti.data.tokens import SCHEMA, token_rows, write_token_table  # noqa: E402
