"""Machines that people have, in the place of this one."""

import os
from typing import NoReturn

import jax
import pytest


def without_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user id without an entry, as containers give it, and no HOME."""

    def unknown(path: str) -> str:
        return path  # which Python's own does when it finds none

    for name in ("HOME", "XDG_CACHE_HOME", "TFDS_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", unknown)


def without_devices(monkeypatch: pytest.MonkeyPatch, platforms: str, said: str) -> None:
    """A JAX that was asked for devices which are not there."""

    def fail(*_: object) -> NoReturn:
        raise RuntimeError(said)

    monkeypatch.setattr(jax, "devices", fail)
    jax_setting(monkeypatch, "jax_platforms", platforms)


def jax_setting(monkeypatch: pytest.MonkeyPatch, name: str, value: object) -> None:
    """What JAX says that it is set to."""
    monkeypatch.setattr(type(jax.config), "values", {**jax.config.values, name: value})
