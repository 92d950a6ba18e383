"""`resnet_flax.data.stream`: what is in the batches, whoever decodes them; who then is gone."""

import contextlib
import gc
import logging
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import numpy as np
import pytest

from resnet_flax.data import BatchStream, Dataset, LazyImages, default_workers, stream
from resnet_flax.data.folder import find_images
from resnet_flax.data.lazy_images import FileStore
from resnet_flax.errors import InputError
from tests.support.image_files import write_photos

TRAIN, TEST = 14, 6  # images: 3 and 2 batches
SIDE = 7  # pixels


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("data") / "photos", count=10, largest=20)


def stream_of(folder: Path, **changes) -> BatchStream:
    """A run's on the images of `write_photos`; the labels are their numbers."""
    store = FileStore.of(folder, find_images(folder).paths)
    images = LazyImages(store, np.arange(TRAIN + TEST), SIDE)
    data = Dataset(images, np.arange(TRAIN + TEST, dtype=np.int32))
    train, test = data.hold_out(TEST)
    rows = {size: np.arange(size) for size in (5, 4)}
    whole = BatchStream(train, test, 2, 5, 4, 0, 0.3, rows)
    return replace(whole, **changes)


def assert_same(found, expected):
    assert len(found) == len(expected)
    for each, other in zip(found, expected, strict=True):
        for name in ("images", "labels", "weights"):
            np.testing.assert_array_equal(getattr(each, name), getattr(other, name))
            assert getattr(each, name).dtype == getattr(other, name).dtype
        assert each.broken == other.broken


# --- What is in them.


def test_each_image_is_in_an_epoch_once_and_its_order_is_the_residents(photos):
    batches = stream_of(photos, random_resized_crop=0.0)
    assert (len(batches), batches.train_steps, batches.test_steps) == (10, 3, 2)
    images = batches.train_set.images
    for epoch in (1, 2):
        first = batches.number(epoch, 0)
        assert first == 5 * (epoch - 1)
        read = [batches[number] for number in range(first, first + 3)]
        order = stream.shuffled_batches(TRAIN, 5, seed=0, epoch=epoch)
        for batch, positions in zip(read, order, strict=True):
            np.testing.assert_array_equal(batch.labels, positions)
            np.testing.assert_array_equal(batch.images, images[positions])
            np.testing.assert_array_equal(batch.weights, np.ones(len(positions), np.float32))
            assert (batch.images.dtype, batch.labels.dtype) == (np.uint8, np.int32)
            assert batch.weights.dtype == np.float32
            assert batch.broken == ()
        labels = np.concatenate([batch.labels for batch in read])
        assert sorted(labels) == list(range(TRAIN))


def test_evaluation_is_in_order_and_filled_up(photos):
    batches = stream_of(photos)
    first, last = batches[3], batches[4]
    assert first.labels.tolist() == [14, 15, 16, 17]
    assert last.labels.tolist() == [18, 19, 19, 19]
    assert first.weights.tolist() == [1, 1, 1, 1]
    assert last.weights.tolist() == [1, 1, 0, 0]
    expected = batches.test_set.images[:]
    np.testing.assert_array_equal(np.concatenate([first.images, last.images])[:6], expected)
    assert not last.images[2:].any()
    assert (first.weights.dtype, first.labels.dtype) == (np.float32, np.int32)
    assert_same([batches[8], batches[9]], [first, last])


def test_crops_are_those_of_seed_epoch_and_image(photos):
    batches = stream_of(photos)
    images = batches.train_set.images
    batch = batches[batches.number(2, 1)]
    for position, found in zip(batch.labels, batch.images, strict=True):
        expected = images.decode_randomly(int(position), 0.3, seed=0, epoch=2)
        np.testing.assert_array_equal(found, expected)


def test_epochs_and_seeds_differ(photos):
    def content(seed, epoch):
        batches = stream_of(photos, seed=seed)
        read = [batches[batches.number(epoch, step)] for step in range(3)]
        pairs = [pair for batch in read for pair in zip(batch.labels, batch.images, strict=True)]
        order = tuple(label for label, _ in pairs)
        return order, frozenset(image.tobytes() for _, image in pairs)

    found = [content(*each) for each in ((0, 1), (0, 2), (1, 1), (1, 2), (2**64 - 1, 1))]
    assert len({order for order, _ in found}) == 5
    assert len(frozenset.union(*(crops for _, crops in found))) == 5 * TRAIN
    assert content(0, 1) == found[0]


def parts(whole: BatchStream, count: int = 2) -> list[BatchStream]:
    """The shares of so many processes, the rows of each not side by side."""
    return [
        replace(whole, rows={size: np.arange(size)[part::count] for size in whole.rows})
        for part in range(count)
    ]


def together(batches) -> stream.Batch:
    size = sum(len(each.labels) for each in batches)
    rows = np.argsort(np.concatenate([np.arange(size)[n :: len(batches)] for n in (0, 1)]))
    arrays = (np.concatenate(each)[rows] for each in list(zip(*batches, strict=True))[:3])
    return stream.Batch(*arrays, tuple(name for each in batches for name in each.broken))


def test_the_shares_of_several_processes_are_the_whole(photos):
    whole = stream_of(photos)
    shares = parts(whole)
    for number in range(len(whole)):
        assert_same([together([share[number] for share in shares])], [whole[number]])


# --- Broken images.


@pytest.fixture
def broken(tmp_path):
    """Two images to train on and one to test on cannot be read."""
    folder = write_photos(tmp_path / "photos", count=10, largest=20)
    paths = find_images(folder).paths
    for number in (3, 4, 17):
        paths[number].write_bytes(b"")
    return folder


@pytest.mark.parametrize("crop", [0.0, 0.3])
def test_in_training_the_next_image_takes_the_place_of_a_broken_one(broken, photos, crop):
    batches = stream_of(broken, random_resized_crop=crop)
    sound = stream_of(photos, random_resized_crop=crop)
    paths = find_images(broken).paths
    for epoch in (1, 2):
        read = [batches[batches.number(epoch, step)] for step in range(3)]
        order = stream.shuffled_batches(TRAIN, 5, seed=0, epoch=epoch)
        taken = {3: 5, 4: 5}
        for batch, positions in zip(read, order, strict=True):
            expected = [taken.get(each, each) for each in positions.tolist()]
            assert batch.labels.tolist() == expected
            images = [sound._train_image(each, epoch) for each in expected]
            np.testing.assert_array_equal(batch.images, images)
            assert batch.weights.all()
            named = [n for each in positions.tolist() for n in {3: (3, 4), 4: (4,)}.get(each, ())]
            assert len(batch.broken) == len(named)
            for line, number in zip(batch.broken, named, strict=True):
                assert line == f"{paths[number]} (not a PNG or JPEG image)"
    whole = [batches[number] for number in range(len(batches))]
    shares = parts(batches)
    for number, expected in enumerate(whole):
        found = together([share[number] for share in shares])
        assert sorted(found.broken) == sorted(expected.broken)
        assert_same([found._replace(broken=())], [expected._replace(broken=())])


def test_the_last_images_are_followed_by_the_first(broken):
    paths = find_images(broken).paths
    for number in (13, 0):
        paths[number].write_bytes(b"")
    batches = stream_of(broken)
    read = [batches[number] for number in range(3)]
    assert sorted(np.concatenate([batch.labels for batch in read])) == sorted(
        [1, 1, 1, 2, 5, 5, 5, *range(6, 13)]
    )


def test_in_evaluation_a_broken_image_does_not_count(broken):
    batch = stream_of(broken)[3]
    assert batch.weights.tolist() == [1, 1, 1, 0]
    assert batch.labels.tolist() == [14, 15, 16, 17]
    assert not batch.images[3].any()
    (line,) = batch.broken
    assert line.endswith("/dogs/07.jpg (not a PNG or JPEG image)")


def test_if_all_are_broken_the_batch_is_black(broken):
    for path in find_images(broken).paths:
        path.write_bytes(b"")
    batch = stream_of(broken)[0]
    assert batch.images.shape == (5, SIDE, SIDE, 3)
    assert not batch.images.any()
    assert batch.labels.tolist() == stream.shuffled_batches(TRAIN, 5, seed=0, epoch=1)[0].tolist()
    assert len(batch.broken) > 5


# --- Who decodes them.


def test_they_are_read_in_order_from_any_of_them_on(photos):
    batches = stream_of(photos)
    expected = [batches[number] for number in range(len(batches))]
    for start in (0, 1, 3, 5, 9, 10):
        assert_same(list(batches.read(start, 0)), expected[start:])


def test_a_stream_travels(photos):
    batches = stream_of(photos)
    batches[0]
    again = pickle.loads(pickle.dumps(batches))
    assert len(pickle.dumps(batches)) < 5000
    assert_same([again[7]], [batches[7]])


def assert_nothing_is_left() -> None:
    """Neither processes nor memory; what else is on this machine has other sizes."""
    assert multiprocessing.active_children() == []
    end = time.monotonic() + 5  # Grain deletes in a thread of its own
    while left_memory() and time.monotonic() < end:
        time.sleep(0.05)
    assert left_memory() == []


def left_memory() -> list[str]:
    sizes = [size * SIDE**2 * 3 for size in (5, 4)]
    found = []
    for path in Path("/dev/shm").glob("psm_*"):
        with contextlib.suppress(OSError):  # another process removes its own
            if path.stat().st_size in sizes:
                found.append(path.name)
    return found


@pytest.mark.parametrize("workers", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_workers_bring_the_same_in_the_same_order(workers, photos, capfd):
    batches = stream_of(photos)
    expected = [batches[number] for number in range(len(batches))]
    assert_same(list(batches.read(0, workers)), expected)
    assert_nothing_is_left()
    reading = batches.read(4, workers)
    assert_same([next(reading) for _ in range(2)], expected[4:6])
    assert len(multiprocessing.active_children()) == workers
    reading.close()
    assert_nothing_is_left()
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_when_a_worker_dies_all_start_again_once(photos, caplog, capfd):
    batches = stream_of(photos, epochs=20)
    expected = [batches[number] for number in range(len(batches))]
    reading = batches.read(3, 2)

    def kill_one() -> None:
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    with caplog.at_level(logging.WARNING, "resnet_flax"):
        found = [next(reading)]
        kill_one()
        found += [next(reading) for _ in range(10)]
        kill_one()
        with pytest.raises(InputError) as caught:
            found += [next(reading) for _ in range(10)]
    assert_same(found, expected[3 : 3 + len(found)])
    line = str(caught.value)
    assert line.startswith("the processes that read the images do not last: Worker process was")
    assert "exit code -9" in line
    assert line.isprintable()
    (record,) = caplog.records
    assert record.getMessage().startswith("restarting the processes that read the images: ")
    assert "exit code -9" in record.getMessage()
    assert multiprocessing.active_children() == []
    gc.collect()
    time.sleep(0.5)
    # What a killed process had in hand stays until this one ends.
    assert len(left_memory()) <= 4
    for name in left_memory():
        SharedMemory(name).unlink()
    assert capfd.readouterr() == ("", "")


READ = """
import signal, sys
from pathlib import Path
from tests.data.test_stream import stream_of

stop = []
signal.signal(signal.SIGINT, lambda *_: stop.append(True))
if __name__ == "__main__":
    print("starting", flush=True)
    reading = stream_of(Path(sys.argv[1]), epochs=10**6).read(0, 2)
    for number, batch in enumerate(reading):
        if number == 5:
            print("reading", flush=True)
        if stop:
            break
    reading.close()
    print("closed", flush=True)
"""


@contextlib.contextmanager
def reader(photos):
    """A process that reads, in a group of its own."""
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", READ, str(photos)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        assert process.stdout.readline() == "starting\n"
        yield process


def end_of(process: subprocess.Popen) -> tuple[str, str]:
    """What it and its workers print up to the end of the last of them, within seconds."""
    try:
        return process.communicate(timeout=20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise


@pytest.mark.slow
def test_workers_end_when_the_process_that_started_them_is_killed(photos):
    with reader(photos) as process:
        assert process.stdout.readline() == "reading\n"
        process.kill()
        started = time.monotonic()
        out, err = end_of(process)
        assert time.monotonic() - started < 5
    assert out == ""
    assert "Traceback" not in err
    assert left_memory() == []


@pytest.mark.slow
@pytest.mark.parametrize("line", ["starting", "reading"])
def test_an_interruption_of_all_processes_ends_them_in_silence(line, photos):
    with reader(photos) as process:
        if line == "reading":
            process.stdout.readline()
        for _ in range(1 if line == "reading" else 40):
            os.killpg(process.pid, signal.SIGINT)
            time.sleep(0.1)
        out, err = end_of(process)
    assert (out, err) == ("closed\n", "")
    assert left_memory() == []


@pytest.mark.parametrize(("cores", "workers"), [(1, 1), (3, 3), (64, 16)])
def test_there_are_as_many_workers_as_cores_within_reason(cores, workers, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    assert default_workers() == workers
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS has none
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert default_workers() == workers
