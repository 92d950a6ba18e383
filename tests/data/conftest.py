import logging

import pytest


@pytest.fixture
def said():
    """What the package tells the user of a command while a test runs, a line each."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("resnet_flax")
    before = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(before)


@pytest.fixture(scope="session")
def torchvision():
    """The package, for tests marked ``foreign``."""
    from tests.support.foreign import import_timm

    import_timm()
    import torchvision.datasets

    return torchvision
