"""pytest's settings for this folder."""


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: killed processes, the real model in full, a browser; left out unless asked for with -m slow")
    config.option.markexpr = config.option.markexpr or "not slow"
