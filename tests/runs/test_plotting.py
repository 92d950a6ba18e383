import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from PIL import Image

from resnet_flax.data import FASHION_MNIST_CLASSES
from resnet_flax.runs.plotting import (
    WRONG,
    plot_confusion,
    plot_curves,
    plot_mistakes,
    plot_predictions,
)
from resnet_flax.training.position import EpochResult
from tests.support.finished_run import random_images

MANY = [f"a rather long class name, number {number}" for number in range(100)]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, in this order."""
    figures = []
    save = Figure.savefig

    def note(self, *arguments, **keywords):
        figures.append(self)
        save(self, *arguments, **keywords)

    monkeypatch.setattr(Figure, "savefig", note)
    return figures


def overlaps(figure, texts):
    """Pairs of texts that cover each other, and texts that leave the picture."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [text.get_window_extent(renderer) for text in texts if text.get_text()]
    page = figure.bbox
    outside = [
        box
        for box in boxes
        if box.x0 < page.x0 - 1 or box.y0 < page.y0 - 1 or box.x1 > page.x1 or box.y1 > page.y1
    ]
    return outside + [
        (one, two)
        for index, one in enumerate(boxes)
        for two in boxes[index + 1 :]
        if one.x0 < two.x1 and two.x0 < one.x1 and one.y0 < two.y1 and two.y0 < one.y1
    ]


def cells(figure):
    """The images of a figure, each with its title."""
    (axes,) = figure.axes
    return list(zip(axes.images, axes.texts, strict=True))


def is_picture(path, smallest=500):
    with Image.open(path) as picture:
        picture.load()
        return picture.format == "PNG" and min(picture.size) >= smallest


def test_curves(tmp_path, drawn):
    results = [EpochResult(epoch, 1 / epoch, 0.5, 0.4, 1.0, 1.0) for epoch in (1, 2, 3)]
    plot_curves(results, tmp_path / "curves.png")
    assert is_picture(tmp_path / "curves.png")
    loss, train, test = drawn[0].axes[0].lines
    assert list(loss.get_ydata()) == [1, 1 / 2, 1 / 3]
    assert list(train.get_ydata()) == [0.5] * 3
    assert list(test.get_ydata()) == [0.4] * 3


def test_the_confusion_matrix_shows_its_numbers(tmp_path, drawn):
    confusion = np.arange(100).reshape(10, 10)
    plot_confusion(confusion, FASHION_MNIST_CLASSES, tmp_path / "confusion.png")
    assert is_picture(tmp_path / "confusion.png")
    axes = drawn[0].axes[0]
    numbers = {(*text.get_position()[::-1], int(text.get_text())) for text in axes.texts}
    assert numbers == {
        (row, column, 10 * row + column) for row in range(10) for column in range(10)
    } - {(0, 0, 0)}
    shares = axes.images[0].get_array()
    np.testing.assert_allclose(shares.sum(1), 1)
    for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [tick.get_text() for tick in ticks] == list(FASHION_MNIST_CLASSES)
    assert not overlaps(drawn[0], [*axes.texts, *axes.get_yticklabels(), axes.xaxis.label])


def test_a_class_without_images_stays_white(tmp_path, drawn):
    plot_confusion(np.array([[3, 1], [0, 0]]), ["one", "two"], tmp_path / "confusion.png")
    assert drawn[0].axes[0].images[0].get_array().tolist() == [[0.75, 0.25], [0, 0]]


def test_a_hundred_classes_fit(tmp_path, drawn):
    plot_confusion(np.eye(100, dtype=int), MANY, tmp_path / "confusion.png")
    axes = drawn[0].axes[0]
    assert not axes.texts
    assert not overlaps(drawn[0], axes.get_yticklabels())


def test_predictions_mark_the_mistakes(tmp_path, drawn):
    data = random_images(50)
    answers = np.where(np.arange(50) % 3, data.labels, (data.labels + 1) % 10)
    path = tmp_path / "predictions.png"
    plot_predictions(data.images, data.labels, answers, FASHION_MNIST_CLASSES, path)
    assert is_picture(path)
    shown = cells(drawn[0])
    assert len(shown) == 32
    for index, (image, title) in enumerate(shown):
        true, predicted = title.get_text().split("\n")
        assert true == FASHION_MNIST_CLASSES[data.labels[index]]
        assert predicted == "✗ " * (index % 3 == 0) + FASHION_MNIST_CLASSES[answers[index]]
        assert (title.get_color() == WRONG) == (index % 3 == 0)
        np.testing.assert_array_equal(image.get_array(), data.images[index, :, :, 0])
    assert not overlaps(drawn[0], [title for _, title in shown])


@pytest.mark.parametrize(
    "classes", [MANY, pytest.param(FASHION_MNIST_CLASSES, marks=pytest.mark.slow)]
)
def test_titles_keep_clear_of_each_other(tmp_path, drawn, classes):
    data = random_images(32)
    longest = max(range(len(classes)), key=lambda index: len(classes[index]))
    labels = np.full(32, longest)
    probabilities = np.zeros((32, len(classes)))
    probabilities[:, (longest + 1) % len(classes)] = 1
    plot_predictions(data.images, labels, labels, classes, tmp_path / "predictions.png")
    plot_mistakes(data.images, labels, probabilities, classes, tmp_path / "mistakes.png")
    for figure in drawn:
        texts = [title for _, title in cells(figure)]
        assert not overlaps(figure, [*texts, figure.texts[0]])  # the last is the heading


@pytest.fixture
def chinese_font(tmp_path):
    """A font of a single letter, 猫, that Matplotlib knows for the time of a test."""
    builder = FontBuilder(1000)
    builder.setupGlyphOrder([".notdef", "cat"])
    builder.setupCharacterMap({ord("猫"): "cat"})
    pen = TTGlyphPen(None)
    for point in ((0, 0), (0, 800), (800, 800)):
        (pen.lineTo if pen.points else pen.moveTo)(point)
    pen.closePath()
    shape = pen.glyph()
    builder.setupGlyf({".notdef": shape, "cat": shape})
    builder.setupHorizontalMetrics({".notdef": (900, 0), "cat": (900, 0)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "One Letter", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "font.ttf")
    before = list(fontManager.ttflist)
    fontManager.addfont(tmp_path / "font.ttf")
    yield
    fontManager.ttflist = before


@pytest.mark.parametrize("found", [False, True])
def test_letters_that_the_usual_font_lacks(tmp_path, drawn, found, request):
    # A warning, as of a missing glyph, is an error here.
    if found:
        request.getfixturevalue("chinese_font")
    images, labels = random_images(3).images, np.arange(3)
    classes = ("猫", "狗", "$\\frac$ bird")
    names = ["猫" if found else "class 0", "class 1", classes[2]]
    plot_confusion(np.eye(3, dtype=int), classes, tmp_path / "confusion.png")
    plot_predictions(images, labels, labels, classes, tmp_path / "predictions.png")
    plot_mistakes(images, labels, np.eye(3)[[1, 2, 0]], classes, tmp_path / "mistakes.png")
    confusion, predictions, mistakes = drawn
    assert [tick.get_text() for tick in confusion.axes[0].get_yticklabels()] == names
    assert [title.get_text() for _, title in cells(predictions)] == [
        f"{name}\n{name}" for name in names
    ]
    assert cells(mistakes)[0][1].get_text() == f"{names[0]}\n{names[1]} 100%"
    family = confusion.axes[0].get_yticklabels()[0].get_fontfamily()
    assert ("One Letter" in family) == found


def test_the_surest_mistakes_come_first(tmp_path, drawn):
    data = random_images(200)
    probabilities = np.random.default_rng(0).dirichlet(np.ones(10), 200)
    answers, path = probabilities.argmax(-1), tmp_path / "mistakes.png"
    plot_mistakes(data.images, data.labels, probabilities, FASHION_MNIST_CLASSES, path)
    assert is_picture(path)
    wrong = sorted(
        (index for index in range(200) if answers[index] != data.labels[index]),
        key=lambda index: -probabilities[index].max(),
    )
    for (image, title), index in zip(cells(drawn[0]), wrong, strict=False):
        np.testing.assert_array_equal(image.get_array(), data.images[index, :, :, 0])
        true, predicted = title.get_text().split("\n")
        assert true == FASHION_MNIST_CLASSES[data.labels[index]]
        name = FASHION_MNIST_CLASSES[answers[index]]
        assert predicted == f"{name} {probabilities[index].max():.0%}"


def test_few_images_colours_and_no_mistakes(tmp_path, drawn):
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    labels, probabilities = np.arange(3), np.eye(3)
    plot_predictions(images, labels, labels, "abc", tmp_path / "predictions.png")
    plot_mistakes(images, labels, probabilities, "abc", tmp_path / "mistakes.png")
    assert is_picture(tmp_path / "predictions.png", 200)
    assert is_picture(tmp_path / "mistakes.png", 200)
    assert len(cells(drawn[0])) == 3
    assert drawn[1].get_suptitle() == "no mistakes in 3 images"
