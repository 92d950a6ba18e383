"""`resnet_flax.data.lazy_images`: images on the disk are those that memory would hold."""

import pickle

import numpy as np
import pytest

from resnet_flax.data import LazyImages, Resizing, image_files, load_dataset
from resnet_flax.data.folder import find_images
from resnet_flax.data.image_files import random_box
from resnet_flax.data.lazy_images import FileStore
from resnet_flax.errors import InputError
from tests.support.image_files import natural_image, random_image, write_photos

RESIZINGS = [None, Resizing(20), Resizing(20, squash=True), Resizing(19, False, "bicubic", True)]


@pytest.fixture
def photos(tmp_path):
    return write_photos(tmp_path / "photos")


def load(folder, **options):
    return load_dataset(f"folder:{folder}", **{"image_size": 16, **options})


def assert_same(lazy, resident):
    assert isinstance(lazy.images, LazyImages)
    assert isinstance(resident.images, np.ndarray)
    assert (lazy.images.shape, lazy.images.dtype) == (resident.images.shape, np.uint8)
    assert len(lazy.images) == len(lazy) == len(resident)
    assert lazy.images.ndim == 4
    np.testing.assert_array_equal(lazy.images[:], resident.images)
    np.testing.assert_array_equal(lazy.labels, resident.labels)


@pytest.mark.parametrize("resizing", RESIZINGS)
def test_a_folder_is_the_same_from_the_disk_as_in_memory(photos, resizing, said):
    lazy, resident = (load(photos, resizing=resizing, stream_above=n) for n in (0, 10**9))
    for part in range(2):
        assert_same(lazy[part], resident[part])
    assert lazy[2:] == resident[2:]
    found = (
        f"folder:{photos}: 8 images to train on, 2 to test on; 16x16 pixels, coloured; 2 classes"
    )
    assert [line for line in said if "2 classes" in line] == [
        f"{found}; decoded as they are needed",
        found,
    ]


def test_a_folder_with_both_parts_is_the_same(tmp_path):
    for part in ("train", "test"):
        write_photos(tmp_path / part)
    lazy, resident = (load(tmp_path, stream_above=above) for above in (0, 10**9))
    for each, other in zip(lazy[:2], resident[:2], strict=True):
        assert_same(each, other)


def test_the_size_of_all_decides_what_stays_on_the_disk(photos):
    size = 10 * 16 * 16 * 3
    assert isinstance(load(photos, stream_above=size).train.images, np.ndarray)
    assert isinstance(load(photos, stream_above=size - 1).train.images, LazyImages)


def test_parts_are_those_of_an_array(photos):
    lazy, resident = (load(photos, stream_above=above).train for above in (0, 10**9))
    chosen = np.array([5, 0, 0, 3])
    for part in (
        lambda data: data.take(3),
        lambda data: data.hold_out(3)[0],
        lambda data: data.hold_out(3)[1],
        lambda data: data.hold_out(3)[1].take(2),
        lambda data: data.select(chosen),
        lambda data: data.select(slice(1, None, 2)).select(slice(1, 3)),
        lambda data: data.select(slice(0)),
    ):
        assert_same(part(lazy), part(resident))
    images = lazy.images
    for which in (slice(2), slice(-2, None), chosen, resident.labels == 1, slice(0)):
        np.testing.assert_array_equal(images[which], resident.images[which])
    assert [len(each) for each in images.select(chosen).select(slice(2))[:]] == [16, 16]


def test_nothing_is_decoded_before_it_is_indexed(photos):
    data = load(photos, stream_above=0)
    for path in photos.rglob("*.jpg"):
        path.write_bytes(b"no longer an image")
    chosen = data.train.take(6).hold_out(2)[1].select(np.array([1, 0]))
    assert chosen.images.shape == (2, 16, 16, 3)
    with pytest.raises(InputError, match=r"^cannot read .*jpg \(not a PNG or JPEG image"):
        chosen.images[:1]


def test_grey_images_have_three_channels(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(3):
            random_image(number, mode="L").save(tmp_path / name / f"{number}.png")
    images = load(tmp_path, stream_above=0).train.images[:]
    assert images.shape == (4, 16, 16, 3)
    assert (images == images[..., :1]).all()


def test_what_is_broken_is_named_or_black_and_noted(photos):
    (photos / "cats" / "01.jpg").write_bytes(b"")
    cut = photos / "dogs" / "03.jpg"
    cut.write_bytes(cut.read_bytes()[:700])
    images = LazyImages(load(photos, stream_above=0).train.images.store, np.arange(10), 16)
    with pytest.raises(InputError) as caught:
        images[:]
    assert str(caught.value).startswith(f"cannot read {photos}/cats/01.jpg (not a PNG or JPEG")
    assert f", {cut} (image file is truncated" in str(caught.value)
    passing = LazyImages(images.store, images.which, 16, skip_broken=True)
    pixels = passing[2:]
    assert passing.broken == {8}
    np.testing.assert_array_equal(np.flatnonzero(~pixels.any((1, 2, 3))), [6])
    assert passing.select(slice(5)).broken == set()


def test_names_that_are_no_text(tmp_path):
    folder = write_photos(tmp_path / "photos", ending="png")
    name = b"\xff\xfe caf\xe9\n.png"
    (folder / "cats" / "00.png").rename(folder / "cats" / name.decode("utf-8", "surrogateescape"))
    lazy, resident = (load(folder, stream_above=above) for above in (0, 10**9))
    assert_same(lazy.train, resident.train)
    assert_same(lazy.test, resident.test)


@pytest.mark.parametrize("name", [".", "./", "../Fotos für München", "../Fotos für München/"])
def test_the_folder_may_be_written_in_many_ways(name, tmp_path, monkeypatch):
    folder = write_photos(tmp_path / "Fotos für München")
    monkeypatch.chdir(folder)
    assert_same(load(name, stream_above=0).train, load(folder).train)


def test_a_million_names_are_small_and_travel(tmp_path):
    paths = [tmp_path / "class" / f"{number:08}.jpeg" for number in range(1000)]
    store = FileStore.of(tmp_path, paths)
    assert store.names.nbytes < 40 * len(paths)
    assert len(pickle.dumps(store)) < 20_000
    again = pickle.loads(pickle.dumps(store))
    assert [again.read(number) for number in range(1000)] == [(str(p), p) for p in paths]


def test_random_crops_are_decided_by_seed_epoch_and_image(photos):
    data = load(photos, stream_above=0).train
    images = data.images

    def crop(position=0, images=images, seed=0, epoch=1):
        return images.decode_randomly(position, 0.2, seed=seed, epoch=epoch).tobytes()

    assert crop() == crop()
    assert len({crop(), crop(seed=1), crop(epoch=2), crop(seed=1, epoch=2), crop(1)}) == 5
    # Whatever else is in the set.
    assert crop(0, images.select(slice(3, 5))) == crop(3)
    assert images.decode_randomly(0, 0.2, seed=2**64 - 1, epoch=1).shape == (16, 16, 3)


# --- Torchvision's.


@pytest.fixture(scope="module")
def hundred(tmp_path_factory):
    """JPEGs of mixed sizes, and of the three kinds that ImageNet has."""
    folder = tmp_path_factory.mktemp("data") / "photos"
    write_photos(folder, count=40, largest=400)
    (folder / "odd").mkdir()
    for number in range(20):
        size = [(30, 300), (256, 256), (224, 230), (257, 401)][number % 4]
        image = natural_image(200 + number, size).convert(["L", "CMYK", "RGB"][number % 3])
        image.save(folder / "odd" / f"{number:02}.JPEG", quality=60)
    return folder


@pytest.mark.foreign
@pytest.mark.parametrize("side", [224, 256])
def test_images_and_labels_are_those_of_torchvisions_image_folder(side, torchvision, hundred):
    transforms = torchvision.transforms
    steps = transforms.Compose([transforms.Resize(side), transforms.CenterCrop(224)])
    theirs = torchvision.datasets.ImageFolder(hundred, steps)
    files = find_images(hundred)
    ours = LazyImages(FileStore.of(hundred, files.paths), np.arange(100), 224, Resizing(side))
    assert len(theirs) == len(ours) == 100
    assert list(files.classes) == theirs.classes
    images, labels = zip(*theirs, strict=True)
    np.testing.assert_array_equal(files.labels, labels)
    np.testing.assert_array_equal(ours[:], np.stack([np.asarray(each) for each in images]))


@pytest.mark.foreign
def test_random_crops_are_torchvisions_of_the_same_boxes(torchvision, hundred, monkeypatch):
    theirs = torchvision.datasets.ImageFolder(hundred)
    files = find_images(hundred)
    ours = LazyImages(FileStore.of(hundred, files.paths), np.arange(100), 224)
    drawn = []

    def draw(*arguments):
        drawn.append(random_box(*arguments))
        return drawn[-1]

    monkeypatch.setattr(image_files, "random_box", draw)
    for number, (image, _) in enumerate(theirs):
        found = ours.decode_randomly(number, 0.08, seed=1, epoch=3)
        left, upper, right, lower = drawn[-1]
        place = (upper, left, lower - upper, right - left)
        expected = torchvision.transforms.functional.resized_crop(image, *place, [224, 224])
        np.testing.assert_array_equal(found, np.asarray(expected))
    assert len({*drawn}) > 90
