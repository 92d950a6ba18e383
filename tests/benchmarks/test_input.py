"""`benchmarks.input`: the photos that it makes, what each contender yields, and what is kept."""

import argparse
import json
import os
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import input as benchmark
from benchmarks.input import (
    LARGE,
    OURS,
    Contender,
    Settings,
    compare,
    data_source,
    from_files,
    from_records,
    generate,
    generate_records,
    megabytes_of_all,
    pillow_alone,
    report_memory,
    report_rates,
    take_turn,
)
from resnet_flax.data import load_dataset

IMAGES, CLASSES, BATCH = 25, 2, 4


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "default_workers", lambda: 1)
        settings = generate(tmp_path_factory.mktemp("input"), "48x32", IMAGES, CLASSES)
    generate_records(settings)
    return settings._replace(batch_size=BATCH)


def test_photos_by_class_no_two_the_same(made: Settings) -> None:
    files = sorted(made.photos.glob("*/*.jpg"))
    assert len(files) == IMAGES
    assert len({file.read_bytes() for file in files}) == IMAGES
    assert {file.parent.name for file in files} == {"class_000", "class_001"}
    for file in files:
        with Image.open(file) as image:
            assert (image.format, image.size, image.mode) == ("JPEG", (48, 32), "RGB")


def test_photos_are_written_once(made: Settings) -> None:
    before = {file: file.stat().st_mtime_ns for file in made.photos.glob("*/*.jpg")}
    assert generate(made.folder.parent, "48x32", IMAGES, CLASSES).photos == made.photos
    assert {file: file.stat().st_mtime_ns for file in made.photos.glob("*/*.jpg")} == before


def test_photos_are_as_large_as_photos_of_that_size(tmp_path: Path) -> None:
    benchmark._write_class(tmp_path, (256, 256), label=0, count=3)
    sizes = [file.stat().st_size for file in tmp_path.glob("*/*.jpg")]
    assert len(sizes) == 3
    assert all(15_000 < size < 25_000 for size in sizes)


def test_the_records_are_the_photos(made: Settings) -> None:
    data = load_dataset("photos", made.records, image_size=32, stream_above=0)
    store = data.train.images.store
    found = sorted(store.read(index)[1] for index in range(len(store)))
    assert found == sorted(file.read_bytes() for file in made.photos.glob("*/*.jpg"))
    assert data.classes == ("class_000", "class_001")


@pytest.mark.parametrize("batches", [from_files, from_records])
def test_ours_yields_random_crops_epoch_after_epoch(made: Settings, batches: Any) -> None:
    found = [batch for batch, _ in zip(batches(made), range(6), strict=False)]  # an epoch has 5
    assert {batch.images.shape for batch in found} == {(BATCH, 224, 224, 3)}
    assert len({image.tobytes() for batch in found for image in batch.images}) == 6 * BATCH
    assert not any(batch.broken for batch in found)


@pytest.mark.parametrize("batches", [pillow_alone, data_source])
def test_a_loop_yields_the_same_kind(made: Settings, batches: Any) -> None:
    batch = next(batches(made))
    assert (batch.shape, batch.dtype) == ((BATCH, 224, 224, 3), np.uint8)
    assert batch.std() > 1


def test_a_turn_counts_what_comes_after_the_first_batches() -> None:
    taken = []

    def batches(settings: Settings) -> Any:
        try:
            for number in range(100):
                time.sleep(0.005)
                taken.append(number)
                yield number
        finally:
            taken.append(-1)

    rate = take_turn(Contender("a", batches), Settings(Path(), 2, 10), timed=4)
    assert taken == [*range(4 + 4), -1]
    assert 0 < rate < 10 / 0.005


def test_the_table_compares_with_as_many_workers(
    made: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    contenders = [
        OURS,
        Contender("theirs", pillow_alone),
        Contender("draft", from_files, draft=True),
        Contender("loop", pillow_alone, workers=False),
        Contender("absent", from_files, torchvision=True),
    ]
    monkeypatch.setattr(benchmark, "CONTENDERS", contenders)
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: None)
    asked = []

    def measure(function: Any, contender: Contender, settings: Settings, timed: int) -> float:
        assert function is take_turn
        asked.append((settings.folder, contender.name, settings.workers))
        return (settings.workers or 1) * (100.0 if contender is OURS else 40.0)

    monkeypatch.setattr(benchmark, "in_own_process", measure)
    large = f"{LARGE}x{LARGE}"
    sizes = {"48x32": made.folder, large: made.folder}
    table, rates = compare(sizes, [1, 2], batch_size=8, timed=3, rounds=2)
    assert [column.partition(",")[0] for column in table.columns] == [
        "",
        "48x32",
        "ours is",
        large,
        "ours is",
    ]
    ratio = "2.50x (2.50-2.50)"
    assert table.rows == [
        ["resnet_flax, files, 1 worker", "100 (100-100)", "", "100 (100-100)", ""],
        ["resnet_flax, files, 2 workers", "200 (200-200)", "", "200 (200-200)", ""],
        ["theirs, 1 worker", "40 (40-40)", ratio, "40 (40-40)", ratio],
        ["theirs, 2 workers", "80 (80-80)", ratio, "80 (80-80)", ratio],
        ["draft, 1 worker", "", "", "40 (40-40)", ratio],
        ["draft, 2 workers", "", "", "80 (80-80)", ratio],
        ["loop", "40 (40-40)", ratio, "40 (40-40)", ratio],
    ]
    assert rates[large]["theirs, 2 workers"] == [80.0, 80.0]
    turn = [name for _, name, _ in asked[:5]]
    assert turn == ["resnet_flax, files"] * 2 + ["theirs"] * 2 + ["loop"]  # then all once more


def test_the_rates_are_kept_with_the_cores_that_eight_gpus_need(
    made: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = {f"{OURS.name}, 1 worker": 300.0, f"{OURS.name}, 3 workers": 800.0}

    def measure(function: Any, *arguments: Any) -> Any:
        if function is not take_turn:
            return function(*arguments)
        return rates[benchmark.row_name(arguments[0], arguments[1].workers)]

    monkeypatch.setattr(benchmark, "in_own_process", measure)
    monkeypatch.setattr(benchmark, "CONTENDERS", [OURS])
    monkeypatch.setattr(benchmark.os, "cpu_count", lambda: 2)  # that three workers share
    options = argparse.Namespace(
        sizes=["48x32"],
        images=IMAGES,
        classes=CLASSES,
        workers=[1, 3],
        batch_size=BATCH,
        batches=3,
        rounds=2,
        output=tmp_path / "rates.json",
    )
    report_rates(options, made.folder.parent)
    kept = json.loads(options.output.read_text())
    name = f"cores for 24,000 images/s, as {OURS.name}, 3 workers"
    assert kept["rows"][-1] == [name, "60", ""]
    assert kept["rates"] == {"48x32": {name: [rate, rate] for name, rate in rates.items()}}
    assert {"pillow", "grain", "jax"} <= kept["versions"].keys()


def epoch(folder: Path, workers: int, batch_size: int, reports: Connection) -> None:
    """In the place of `stream_epoch`."""
    assert len([*folder.glob("*/*.jpg")]) == IMAGES
    for count in range(batch_size, 5 * batch_size, batch_size):
        time.sleep(0.4)
        reports.send(count)


def test_the_memory_of_an_epoch_is_watched_drawn_and_kept(
    made: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "stream_epoch", epoch)
    options = argparse.Namespace(
        sizes=["48x32"],
        images=IMAGES,
        classes=CLASSES,
        workers=[1, 3],
        batch_size=BATCH,
        output=tmp_path / "memory.json",
        picture=tmp_path / "memory.png",
    )
    report_memory(options, made.folder.parent)
    kept = json.loads(options.output.read_text())
    (row,) = kept["rows"]
    told = dict(zip(kept["columns"], row, strict=True))
    assert told["an epoch"] == "25 JPEGs of 48x32, 2 classes"
    assert told["workers"] == "3"
    assert 0.4 <= float(told["first batch after, s"]) < 60
    assert 0 < float(told["images/s"]) <= BATCH / 0.4 + 1
    assert float(told["peak MB"]) == max(megabytes for _, megabytes in kept["memory"]) > 5
    with Image.open(options.picture) as picture:
        assert picture.size == (960, 360)


def test_the_memory_of_a_process_is_its_childrens_too() -> None:
    alone = megabytes_of_all(os.getpid())
    receiving, sending = benchmark.SPAWN.Pipe(duplex=False)
    child = benchmark.SPAWN.Process(target=fill_memory, args=(sending,))
    child.start()
    try:
        receiving.recv()
        assert megabytes_of_all(os.getpid()) > alone + 150
    finally:
        child.kill()
        child.join()


def fill_memory(ready: Connection) -> None:
    filled = np.ones(200_000_000, np.uint8)
    ready.send(int(filled[-1]))
    time.sleep(60)
