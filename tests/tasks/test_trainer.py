"""What fairseq's Trainer and its thread that loads data do beside the passes."""

import threading
import time

import numpy as np
from fairseq.data import data_utils

import fairseq_asam.tasks  # noqa: F401  what this test is about
from fairseq_asam.sharpness.random_state import RandomState


def test_data_that_a_thread_loads_during_the_passes_have_the_noise_of_their_seed():
    """As with --num-workers 0, when both passes of an update restore the state of numpy."""
    drawn = []

    def load():
        for seed in range(200):
            with data_utils.numpy_seed(seed):
                first = np.random.rand()
                time.sleep(1e-4)
                drawn.append((first, np.random.rand()))

    thread = threading.Thread(target=load)
    thread.start()
    while thread.is_alive():
        RandomState().restore()
    RandomState.release()
    assert drawn == [tuple(np.random.RandomState(seed).rand(2)) for seed in range(200)]
