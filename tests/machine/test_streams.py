"""Streams that are closed, of a small alphabet, or without a reader."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from resnet_flax.machine.streams import flush_streams, open_streams

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("closed", ["2>&-", ">&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_no_file_gets_a_closed_streams_number(tmp_path, closed):
    program = """
import os, sys
from resnet_flax.machine.streams import flush_streams, open_streams
open_streams()
with open("file", "w") as file:
    print("to stdout", flush=True)
    print("to stderr", file=sys.stderr, flush=True)
    for number in (1, 2):
        os.write(number, b"from C")
    flush_streams()
    file.write(str(file.fileno()))
"""
    command = f"exec {sys.executable} -c '{program}' {closed}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(["sh", "-c", command], cwd=tmp_path, env=environment, check=True)
    assert int((tmp_path / "file").read_text()) > 2


def test_no_stream_at_all_is_the_null_device(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # as pythonw has it
    monkeypatch.setattr(sys, "stderr", None)
    open_streams()
    with sys.stdout, sys.stderr:
        print("out", "猫")
        print("err", file=sys.stderr)
        assert sys.stderr.name == os.devnull


@pytest.mark.parametrize(
    ("encoding", "errors", "written"),
    [
        ("ascii", "strict", rb"\u732b \udcff"),
        ("ascii", "surrogateescape", rb"\u732b \udcff"),
        ("utf-8", "strict", "猫".encode() + rb" \udcff"),
        ("ascii", "replace", b"? ?"),  # which the user asked for
    ],
)
def test_a_letter_that_the_stream_lacks_is_escaped(monkeypatch, encoding, errors, written):
    stream = io.TextIOWrapper(io.BytesIO(), encoding, errors)
    monkeypatch.setattr(sys, "stdout", stream)
    open_streams()
    print("猫", os.fsdecode(b"\xff"), end="", flush=True)
    assert stream.buffer.getvalue() == written


def test_what_nobody_reads_is_dropped_once_told(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        print("text")
        with pytest.raises(BrokenPipeError):
            flush_streams()
        print("more")
        flush_streams()
