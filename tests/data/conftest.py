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
