"""Shared fixtures."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _one_thread_per_worker():
    """Two pytest workers share two cores; more threads would only fight."""
    torch.set_num_threads(1)
