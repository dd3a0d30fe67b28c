"""pytest's settings for this folder."""

import os

import pytest


def pytest_configure(config):
    """Leave slow tests out, unless -m asks for them."""
    about = "slow: killed processes, the real model in full, a browser; only with -m slow"
    config.addinivalue_line("markers", about)
    config.option.markexpr = config.option.markexpr or "not slow"


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Two workers unless -n says otherwise: many tests wait for a process or a server."""
    is_worker = "PYTEST_XDIST_WORKER" in os.environ  # a worker must not start workers
    if not is_worker and getattr(config.option, "numprocesses", 0) is None:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        config.option.numprocesses = 2
