"""The whole flow through the command line, with the real worker: what a user does on one day, in that order.

The runs build on each other, so each is a fixture of the module: a test takes the runs it speaks of.
"""

import json
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks import tracking
from tasks.stages import read_manifest

Folder = Path
KL = ["--set", "ppo.kl_coef=0.2", "--set", "ppo.steps=30"]


def rlhf(folder: Path, command: str, *arguments: str, api: str = "") -> Any:
    from importlib.util import module_from_spec, spec_from_file_location

    raise NotImplementedError
