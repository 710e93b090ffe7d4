"""Ranks that end: with the exit code they were given, whatever gloo's threads are still at."""

import pytest

from tests.ranks import PROGRAMS, finish, start_ranks


@pytest.mark.slow
def test_a_rank_ends_with_its_exit_code_while_sums_are_in_flight():
    for _ in range(3):  # Python's own end aborts every second rank
        finish(start_ranks(f"{PROGRAMS}.in_flight", [], 2), 7)
