"""pytest's settings for this folder."""


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than a few seconds; run by default, left out with -m 'not slow'")
