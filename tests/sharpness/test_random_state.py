"""RandomState: whatever a pass draws, the next draws again."""

import os
import random
import sys
import threading
import time

import numpy as np
import pytest
import torch

from fairseq_asam.sharpness.random_state import RandomState
from tests.processes import forkserver

DEFAULT_RNG = np.random.default_rng


@pytest.fixture(autouse=True)
def released():
    yield
    RandomState.release()
    assert np.random.default_rng is DEFAULT_RNG


def draw():
    fresh, other = np.random.default_rng(), np.random.default_rng(None)
    return random.random(), torch.rand(()).item(), np.random.random(), fresh.random(), other.random()


def test_every_generator_goes_back():
    state = RandomState()
    first = draw()
    state.restore()
    assert draw() == first
    assert len(set(first)) == len(set(draw())) == 5


def test_several_passes_each_go_back_to_their_own_beginning():
    states, drawn = [], []
    for _ in range(3):
        states.append(RandomState())
        drawn.append(draw())
        draw()  # between two passes
    for state, expected in zip(states, drawn):
        state.restore()
        assert draw() == expected
    assert len(set(drawn)) == 3


def test_a_second_pass_may_draw_more_than_the_first():
    state = RandomState()
    first = np.random.default_rng().random()
    state.restore()
    second, more = np.random.default_rng().random(), np.random.default_rng().random()
    assert second == first != more


def test_seeds_of_the_caller_s_own_and_other_threads_are_left_alone():
    state = RandomState()
    assert np.random.default_rng(7).random() == DEFAULT_RNG(7).random()
    drawn = []
    for _ in range(2):
        state.restore()
        thread = threading.Thread(target=lambda: drawn.append(np.random.default_rng().random()))
        thread.start()
        thread.join()
    assert drawn[0] != drawn[1]


def _record_while_others_draw(seconds):
    threading.excepthook = lambda _: os._exit(1)
    sys.setswitchinterval(1e-6)
    generator = np.random.default_rng(3)
    end = time.monotonic() + seconds

    def draw():
        while time.monotonic() < end:
            for _ in range(100):
                np.random.default_rng(generator)

    threads = [threading.Thread(target=draw) for _ in range(2)]
    for thread in threads:
        thread.start()
    while time.monotonic() < end:
        RandomState()
        RandomState.release()
    for thread in threads:
        thread.join()


def test_threads_that_load_data_may_draw_at_any_time():
    """As with fairseq's --num-workers 0. A fault ends the process, hence one of its own."""
    process = forkserver.Process(target=_record_while_others_draw, args=(1.5,))
    process.start()
    process.join()
    assert process.exitcode == 0
