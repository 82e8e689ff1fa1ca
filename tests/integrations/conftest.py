"""What the tests of the three frameworks share."""

from __future__ import annotations

import os

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState


@pytest.fixture(autouse=True)
def types_that_torch_loads():
    """Those that the fairseq plugin allows. transformers takes some of them away when it resumes a run."""
    knows_safe_types = hasattr(torch.serialization, "get_safe_globals")  # from torch 2.4 on
    allowed = torch.serialization.get_safe_globals() if knows_safe_types else []
    yield
    if knows_safe_types:
        torch.serialization.add_safe_globals(allowed)


@pytest.fixture(autouse=True)
def accelerator_of_its_own():
    """A new state of accelerate, which has one in a process. HuggingFace's Trainer makes it too.

    Either keeps a part of it in the environment, such as how to compile.
    """
    environment = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(environment)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
