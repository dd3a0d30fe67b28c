"""pytest's settings for this folder."""

import os

import pytest


def pytest_configure(config):
    config.addinivalue_line(
        "markers",
        "slow: killed processes, the real model in full, a browser; left out unless asked for with -m slow",
    )
    config.option.markexpr = config.option.markexpr or "not slow"


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Two workers, unless -n says otherwise: half of the time goes to starting Python, which takes one core."""
    if (
        "PYTEST_XDIST_WORKER" not in os.environ
        and getattr(config.option, "numprocesses", 0) is None
    ):  # a worker must not start workers
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        config.option.numprocesses = 2
