"""How quickly images come from the disk, without a network: here, by Pillow, PyTorch and TFDS.

``python -m benchmarks.input`` generates JPEG photos by class, and the same as TFDS' ArrayRecord
files, and makes batches of random crops of 224x224 pixels from them. The contenders take turns; a
turn is a process of its own, whose workers have begun before the clock starts. All decode with
Pillow; PyTorch's mirror the crops as well, which ours do on the device. "ours is" compares with
`resnet_flax`, files, by as many workers. It takes about twenty minutes on two cores.

``python -m benchmarks.input --memory`` streams an epoch of a large folder to the device as a run
does, and draws the memory of all its processes: the sum of their proportional set sizes, in which
shared pages count once.
"""

import argparse
import concurrent.futures
import contextlib
import importlib.util
import itertools
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from benchmarks.tables import PACKAGES, RESULTS, ROOT, Table, machine, spread, versions
from resnet_flax.data import BatchStream, Dataset, default_workers, load_dataset
from resnet_flax.data.image_files import random_box
from resnet_flax.data.tfds import quiet_tfds

SIZE = 224  # of the crops, pixels
SMALLEST = 0.08  # torchvision's least share of the area
LARGE = 2 * SIZE  # the shorter side that a JPEG needs for a crop to be decoded at half its size
QUALITY, NOISE = 90, 8.0  # with which 256x256 pixels take 20 kB, as photos of that size do
BASES = 48  # photos that all others are shifts of: drawing one takes longer than its JPEG
RECORDS = "photos"  # the name of the set in TFDS' layout
EPOCHS = 10**6
NEEDED = 24_000  # images/s: eight GPUs, each of the 3,000 that benchmarks/scaling.py assumes
PICTURE = ROOT / "docs" / "input_memory.png"
# A process that has imported neither JAX nor PyTorch, for whoever starts workers from it.
SPAWN = multiprocessing.get_context("spawn")

Batches = Iterator[Any]


class Settings(NamedTuple):
    """What a contender is asked for.

    Attributes:
        folder: of photos by class, beside a folder in TFDS' layout (`photos`, `records`).
        workers: processes.
        batch_size: images.
    """

    folder: Path
    workers: int
    batch_size: int

    @property
    def photos(self) -> Path:
        """``CLASS/NUMBER.jpg``."""
        return self.folder / "photos"

    @property
    def records(self) -> Path:
        """TFDS' data folder."""
        return self.folder / "records"


def generate(folder: Path, size: str, images: int, classes: int) -> Settings:
    """Writes photos of a size such as "500x375" into a folder in that one, unless there."""
    settings = Settings(folder / f"{size}-{images}-{classes}", 0, 0)
    width, height = map(int, size.split("x"))
    counts = np.bincount(np.arange(images) % classes)
    with concurrent.futures.ProcessPoolExecutor(default_workers(), SPAWN) as pool:
        write = partial(_write_class, settings.photos, (width, height))
        list(pool.map(write, range(classes), counts.tolist()))
    return settings


def _write_class(folder: Path, size: tuple[int, int], label: int, count: int) -> None:
    home = folder / f"class_{label:03}"
    home.mkdir(parents=True, exist_ok=True)
    if len([*home.iterdir()]) == count:
        return
    bases, generator = _bases(size), np.random.default_rng(label)
    for number in range(count):
        pixels = bases[generator.integers(len(bases))]
        shift = generator.integers(pixels.shape[:2])
        moved = np.roll(pixels, tuple(shift.tolist()), (0, 1))
        Image.fromarray(moved).save(home / f"{number:05}.jpg", quality=QUALITY)


@cache
def _bases(size: tuple[int, int]) -> list[np.ndarray]:
    """Smooth random fields of all scales with a little noise, uint8 (height, width, 3)."""
    generator, photos = np.random.default_rng(0), []
    for _ in range(BASES):
        field = generator.normal(0, NOISE, (*size[::-1], 3))
        for cells in (2, 4, 8, 16, 32, 64):  # the coarser, the stronger, as in photos
            shape = (3, max(1, size[1] * cells // size[0]), cells)
            coarse = generator.normal(0, 1, shape).astype(np.float32)
            channels = [np.asarray(Image.fromarray(each).resize(size, 3)) for each in coarse]
            field += 90 / cells * np.stack(channels, axis=2)
        photos.append(np.clip(128 + field, 0, 255).astype(np.uint8))
    return photos


def generate_records(settings: Settings) -> None:
    """Prepares the same photos as TFDS does, unless they are there; it needs no TensorFlow."""
    files = sorted(settings.photos.glob("*/*.jpg"))
    classes = sorted({file.parent.name for file in files})
    with quiet_tfds() as tfds, contextlib.redirect_stdout(None):  # TFDS prints its progress
        base: Any = tfds.core.GeneratorBasedBuilder

        class Photos(base, skip_registration=True):  # type: ignore[misc, call-arg]
            VERSION = tfds.core.Version("1.0.0")
            name = RECORDS

            def _info(self) -> Any:
                features = {
                    "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
                    "label": tfds.features.ClassLabel(names=classes),
                }
                return tfds.core.DatasetInfo(
                    builder=self,
                    features=tfds.features.FeaturesDict(features),
                    supervised_keys=("image", "label"),
                )

            def _split_generators(self, dl_manager: Any) -> Any:
                return {"train": self._generate_examples()}

            def _generate_examples(self) -> Any:
                for number, file in enumerate(files):
                    yield number, {"image": file.read_bytes(), "label": file.parent.name}

        Photos(data_dir=settings.records).download_and_prepare(file_format="array_record")


def from_files(settings: Settings, draft: bool = False) -> Batches:
    """Ours, of a folder."""
    name = f"folder:{settings.photos}"
    return _streamed(settings, load_dataset(name, image_size=SIZE, stream_above=0, draft=draft)[0])


def from_records(settings: Settings) -> Batches:
    """Ours, of ArrayRecord files."""
    data = load_dataset(RECORDS, settings.records, image_size=SIZE, stream_above=0)
    return _streamed(settings, data.train)


def _streamed(settings: Settings, train_set: Dataset) -> Batches:
    size = settings.batch_size
    whole = train_set.take(len(train_set) // size * size)
    nothing = train_set.select(slice(0))  # no evaluation in between
    stream = BatchStream(
        whole, nothing, EPOCHS, size, size, 0, SMALLEST, rows={size: np.arange(size)}
    )
    return stream.read(0, settings.workers)


def pillow_alone(settings: Settings) -> Batches:
    """A plain loop."""
    files = [*settings.photos.glob("*/*.jpg")]

    def photo() -> Any:
        with Image.open(random.choice(files)) as image:
            return image.convert("RGB")

    return _loop(photo, settings.batch_size)


def data_source(settings: Settings) -> Batches:
    """TFDS' own, which decodes by Pillow or OpenCV, in a plain loop."""
    source = _data_source(settings)

    def photo() -> Any:
        example = source[random.randrange(len(source))]
        return Image.fromarray(example["image"])

    return _loop(photo, settings.batch_size)


def _loop(photo: Callable[[], Any], batch_size: int) -> Batches:
    while True:
        crops = []
        for _ in range(batch_size):
            image = photo()
            box = random_box(image.size, [random.random() for _ in range(40)], SMALLEST)
            part = image.crop(box).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
            crops.append(np.asarray(part))
        yield np.stack(crops)


def image_folder(settings: Settings) -> Batches:
    """PyTorch's DataLoader of torchvision's ImageFolder."""
    from torchvision.datasets import ImageFolder

    return _data_loader(settings, ImageFolder(settings.photos, _torchvision_transform()))


def data_source_in_data_loader(settings: Settings) -> Batches:
    """PyTorch's DataLoader of TFDS' data source, as TFDS' guide has it."""
    return _data_loader(settings, _Transformed(_data_source(settings)))


class _Transformed:
    """A data source as torchvision has data sets."""

    def __init__(self, source: Any) -> None:
        self.source, self.transform = source, _torchvision_transform()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Any:
        example = self.source[index]
        return self.transform(Image.fromarray(example["image"])), int(example["label"])


def _data_source(settings: Settings) -> Any:
    with quiet_tfds() as tfds:
        return tfds.data_source(RECORDS, data_dir=settings.records, split="train")


def _torchvision_transform() -> Any:
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, (SMALLEST, 1)),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
        ]
    )


def _data_loader(settings: Settings, data: Any) -> Batches:
    from torch.utils.data import DataLoader, RandomSampler

    many = RandomSampler(data, replacement=True, num_samples=EPOCHS * settings.batch_size)
    loader = DataLoader(
        data,
        settings.batch_size,
        sampler=many,
        num_workers=settings.workers,
        prefetch_factor=2,
        persistent_workers=True,
    )
    yield from loader


class Contender(NamedTuple):
    """A row of the table."""

    name: str
    batches: Callable[[Settings], Batches]
    workers: bool = True  # whether it has any
    torchvision: bool = False  # whether it needs it
    draft: bool = False  # whether it is for large photos alone


OURS = Contender("resnet_flax, files", from_files)
CONTENDERS = [
    OURS,
    Contender("PyTorch's DataLoader, ImageFolder", image_folder, torchvision=True),
    Contender("resnet_flax, ArrayRecord", from_records),
    Contender(
        "PyTorch's DataLoader, TFDS' data source", data_source_in_data_loader, torchvision=True
    ),
    Contender("resnet_flax, files, `--draft`", partial(from_files, draft=True), draft=True),
    Contender("Pillow, a loop in one process", pillow_alone, workers=False),
    Contender("TFDS' data source, a loop in one process", data_source, workers=False),
]


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What it returns; its imports, threads and memory end with it."""
    with concurrent.futures.ProcessPoolExecutor(1, SPAWN) as pool:
        return pool.submit(function, *arguments).result()


def take_turn(contender: Contender, settings: Settings, timed: int) -> float:
    """Images/s of so many batches, after the first of each worker, which imports meanwhile."""
    batches = contender.batches(settings)
    try:
        for _ in range(2 * settings.workers or 1):
            next(batches)
        started = time.perf_counter()
        for _ in range(timed):
            next(batches)
        return settings.batch_size * timed / (time.perf_counter() - started)
    finally:
        batches.close()  # type: ignore[attr-defined]


def compare(
    sizes: dict[str, Path], workers: list[int], batch_size: int, timed: int, rounds: int
) -> tuple[Table, dict[str, dict[str, list[float]]]]:
    """Measures all contenders in turns.

    Args:
        sizes: such as "500x375" -> the folder.
        workers: how many processes, each number for itself.
        batch_size: images.
        timed: batches in a turn.
        rounds: turns of each contender.

    Returns:
        the table; and images/s, size -> row -> rounds.
    """
    there = importlib.util.find_spec("torchvision") is not None
    if not there:
        print("without PyTorch's DataLoader: torchvision is not installed\n")
    possible = [each for each in CONTENDERS if there or not each.torchvision]
    if max(map(shorter, sizes)) < LARGE:
        possible = [each for each in possible if not each.draft]
    rows = [
        (row_name(each, number), each, number)
        for each in possible
        for number in (workers if each.workers else [0])
    ]
    rates: dict[str, dict[str, list[float]]] = {}
    columns = [""]
    for size, folder in sizes.items():
        files = [*(folder / "photos").glob("*/*.jpg")]
        columns += [f"{size}, {statistics.mean(f.stat().st_size for f in files) / 1e3:.0f} kB"]
        columns += ["ours is"]
        chosen = [row for row in rows if not row[1].draft or shorter(size) >= LARGE]
        rates[size] = {name: [] for name, *_ in chosen}
        for turn in range(rounds):
            print(f"{size}: round {turn + 1} of {rounds}", flush=True)
            for name, contender, number in chosen:
                settings = Settings(folder, number, batch_size)
                rates[size][name].append(in_own_process(take_turn, contender, settings, timed))
    print()
    table = Table(*columns)
    for name, contender, number in rows:
        cells = []
        for measured in rates.values():
            ours = measured[row_name(OURS, number or workers[0])]
            theirs = measured.get(name, [])
            ratios = [a / b for a, b in zip(ours, theirs, strict=bool(theirs))]
            own = contender is OURS or not ratios
            cells += [
                spread(theirs, 0) if theirs else "",
                "" if own else spread(ratios, 2, "x"),
            ]
        table.add(name, *cells)
    return table, rates


def row_name(contender: Contender, workers: int) -> str:
    """Of the table."""
    several = "s" * (workers > 1)
    return f"{contender.name}, {workers} worker{several}" if workers else contender.name


def shorter(size: str) -> int:
    """Of the two sides in "500x375"."""
    return min(map(int, size.split("x")))


def stream_epoch(folder: Path, workers: int, batch_size: int, reports: Connection) -> None:
    """Places an epoch's batches on the device, and sends how many images have come, each time."""
    import jax

    from resnet_flax.machine.devices import data_mesh
    from resnet_flax.machine.runtime import configure_runtime
    from resnet_flax.runs import TrainConfig
    from resnet_flax.runs.run_folder import resolve
    from resnet_flax.runs.train import feed_of, load_data

    configure_runtime()
    config = resolve(
        TrainConfig(
            recipe="finetune",  # of random resized crops
            dataset=f"folder:{folder}",
            stream="always",
            image_size=SIZE,
            batch_size=batch_size,
            epochs=1,
            workers=workers,
        )
    )
    feed = feed_of(config, load_data(config), data_mesh())
    calls = (call.arguments for call in feed.train(1, 0, lambda: ()))
    count = 0
    for arguments in itertools.chain(calls, feed.test()):
        jax.block_until_ready(arguments)
        count += len(arguments[1])
        reports.send(count)
    feed.close()


def watch_epoch(
    folder: Path, workers: int, batch_size: int, every: float = 1.0
) -> tuple[list[tuple[float, float]], list[tuple[float, int]]]:
    """Runs `stream_epoch` in a process of its own.

    Returns:
        seconds since its start and megabytes of all its processes, so often; and, batch by batch,
        seconds and images so far.
    """
    receiving, sending = SPAWN.Pipe(duplex=False)
    process = SPAWN.Process(target=stream_epoch, args=(folder, workers, batch_size, sending))
    started = next_sample = time.perf_counter()
    process.start()
    sending.close()
    assert process.pid
    memory, images = [], []
    while process.is_alive() or receiving.poll():
        if receiving.poll(max(0.0, next_sample - time.perf_counter())):
            try:
                images.append((time.perf_counter() - started, receiving.recv()))
            except EOFError:
                break
        if time.perf_counter() >= next_sample:
            memory.append((time.perf_counter() - started, megabytes_of_all(process.pid)))
            next_sample += every
    process.join()
    if process.exitcode:
        raise SystemExit(f"the stream ended with exit code {process.exitcode}")
    return memory, images


def megabytes_of_all(process: int) -> float:
    """Proportional set sizes of a process and all that it has started, in Linux."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            status = (entry / "stat").read_text()
        except OSError:  # it has ended
            continue
        parents[int(entry.name)] = int(status.rpartition(")")[2].split()[1])
    family = {process}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    return sum(map(_megabytes, family))


def _megabytes(process: int) -> float:
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(each.split()[1]) for each in lines if each.startswith("Pss:")) * 1024 / 1e6


def draw_memory(memory: list[tuple[float, float]], path: Path) -> None:
    """Draws megabytes over seconds."""
    from matplotlib.figure import Figure  # not in each worker

    figure = Figure(figsize=(8, 3), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*memory, strict=True), "k-", linewidth=1)
    axes.set(xlabel="seconds since the start", ylabel="MB in all processes", ylim=(0, None))
    axes.grid(alpha=0.4)
    figure.savefig(path)


def report_memory(options: argparse.Namespace, folder: Path) -> None:
    """Generates the photos, watches an epoch of them, prints the table and keeps it."""
    (size,) = options.sizes[:1]
    started = time.perf_counter()
    photos = generate(folder, size, options.images, options.classes).photos
    print(f"{options.images} photos are there after {time.perf_counter() - started:.0f} s\n")
    workers = max(options.workers)
    memory, images = watch_epoch(photos, workers, options.batch_size)
    draw_memory(memory, options.picture)
    (first, begun), (last, count) = images[0], images[-1]
    half = [megabytes for seconds, megabytes in memory if first < seconds < last]
    parts = [half[len(half) // 4 : len(half) // 2], half[len(half) // 2 :]]
    columns = ("workers", "first batch after, s", "images/s", "peak MB", "MB, 2nd quarter")
    table = Table("an epoch", *columns, "MB, last half")
    medians = (f"{statistics.median(each):.0f}" if each else "" for each in parts)
    table.add(
        f"{options.images:,} JPEGs of {size}, {options.classes} classes",
        str(workers),
        f"{first:.1f}",
        f"{(count - begun) / (last - first):.0f}",
        f"{max(megabytes for _, megabytes in memory):.0f}",
        *medians,
    )
    rounded = [[round(seconds, 1), round(megabytes)] for seconds, megabytes in memory]
    table.keep(options.output or RESULTS / "input_memory.json", memory=rounded)


def report_rates(options: argparse.Namespace, folder: Path) -> None:
    """Generates the photos, measures, prints the table and keeps it."""
    folders = {}
    for size in options.sizes:
        settings = generate(folder, size, options.images, options.classes)
        in_own_process(generate_records, settings)
        folders[size] = settings.folder
    told = versions((*PACKAGES, "torchvision", "pillow", "grain"))
    print(f"{machine()}; {', '.join(' '.join(each) for each in told.items())}\n")
    table, rates = compare(
        folders, options.workers, options.batch_size, options.batches, options.rounds
    )
    most, cores = max(options.workers), os.cpu_count() or 1
    cells = []
    for rows in rates.values():
        of_a_core = statistics.median(rows[row_name(OURS, most)]) / min(most, cores)
        cells += [f"{NEEDED / of_a_core:.0f}", ""]
    table.add(f"cores for {NEEDED:,} images/s, as {row_name(OURS, most)}", *cells)
    rounded = {
        size: {name: [round(each, 1) for each in values] for name, values in rows.items()}
        for size, rows in rates.items()
    }
    table.keep(options.output or RESULTS / "input.json", versions=told, rates=rounded)


def main() -> None:
    """Prints the table and keeps it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--memory", action="store_true", help="watch an epoch of the first size")
    parser.add_argument("--folder", type=Path, help="keeps the photos (default: a temporary one)")
    parser.add_argument(
        "--sizes", nargs="+", default=["256x256", "500x375", "1000x750"], help="WIDTHxHEIGHT"
    )
    parser.add_argument("--images", type=int, help="default: 2000, or 50000 with --memory")
    parser.add_argument("--classes", type=int, help="default: 10, or 500 with --memory")
    parser.add_argument("--workers", type=int, nargs="+", default=sorted({1, default_workers()}))
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=16, help="in a turn")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender")
    parser.add_argument("--output", type=Path, help="keeps the table (default: in results)")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="of --memory")
    options = parser.parse_args()
    options.images = options.images or (50_000 if options.memory else 2_000)
    options.classes = options.classes or (500 if options.memory else 10)
    with tempfile.TemporaryDirectory() as temporary:
        report = report_memory if options.memory else report_rates
        report(options, options.folder or Path(temporary))


if __name__ == "__main__":
    main()
