"""What the tests of the three frameworks share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def types_that_torch_loads():
    """Those that the fairseq plugin allows. transformers takes some of them away when it resumes a run."""
    allowed = torch.serialization.get_safe_globals()
    yield
    torch.serialization.add_safe_globals(allowed)
