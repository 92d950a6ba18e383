"""`--tensorboard`: what is in the event files, and that no point is there twice."""

import builtins
import time

import pytest

from resnet_flax.data.tfds import read_tfrecords
from resnet_flax.errors import InputError
from resnet_flax.runs.tensorboard import TAGS, import_tensorboard, write_events
from resnet_flax.training.position import EpochResult

RESULTS = [EpochResult(n, 1 / n, 0.5 + n / 100, 0.4 + n / 100, 100.0 * n, 10.0) for n in (1, 2, 3)]


def read_all(folder):
    """Tag -> its points (step, value, time), as TensorBoard shows them; and all raw points."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    shown: dict = {}
    raw = 0
    for file in sorted(folder.glob("*tfevents*")):
        for record in read_tfrecords(file):
            event = Event.FromString(record)
            if event.session_log.status == SessionLog.START:
                for points in shown.values():
                    points[:] = [point for point in points if point[0] < event.step]
            for value in event.summary.value:
                raw += 1
                points = shown.setdefault(value.tag, [])
                points.append((event.step, value.simple_value, event.wall_time))
    return shown, raw


def test_every_figure_of_every_epoch_is_there_once(tmp_path):
    for epochs in (1, 2, 3):
        write_events(RESULTS[:epochs], tmp_path)
    shown, raw = read_all(tmp_path)
    assert raw == 3 * len(TAGS)
    assert set(shown) == {"loss/train", "accuracy/train", "accuracy/test", "examples_per_sec"}
    for field, tag in TAGS.items():
        assert [step for step, _, _ in shown[tag]] == [1, 2, 3]
        expected = [getattr(result, field) for result in RESULTS]
        assert [value for _, value, _ in shown[tag]] == pytest.approx(expected)


def test_a_resumed_run_repeats_nothing(tmp_path):
    """An epoch whose checkpoint was lost is trained again, and has its points already."""
    write_events(RESULTS, tmp_path)
    again = [*RESULTS[:2], RESULTS[2]._replace(loss=9.0)]
    write_events(again, tmp_path)
    shown, raw = read_all(tmp_path)
    assert raw == 3 * len(TAGS)
    assert [value for _, value, _ in shown["loss/train"]] == pytest.approx([1, 0.5, 9.0])


def test_a_reader_of_the_earlier_file_is_told_to_drop_it(tmp_path):
    write_events(RESULTS[:2], tmp_path)
    (early,) = tmp_path.glob("*tfevents*")
    content = early.read_bytes()
    write_events(RESULTS, tmp_path)
    early.with_name("a.tfevents").write_bytes(content)  # sorted before the new one
    shown, raw = read_all(tmp_path)
    assert raw == 5 * len(TAGS)
    assert [step for step, _, _ in shown["accuracy/test"]] == [1, 2, 3]


def test_times_are_those_at_which_the_epochs_ended(tmp_path):
    write_events(RESULTS, tmp_path)
    times = [when for _, _, when in read_all(tmp_path)[0]["loss/train"]]
    assert [later - times[0] for later in times] == pytest.approx([0, 10, 20], abs=0.01)
    assert times[-1] == pytest.approx(time.time(), abs=60)


def test_other_files_of_the_run_stay(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    write_events(RESULTS, tmp_path)
    write_events(RESULTS, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_missing_library_is_told_in_one_line(monkeypatch):
    imports = builtins.__import__

    def without(name, *arguments, **keywords):
        if name == "tensorboardX":
            raise ImportError(name)
        return imports(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        InputError, match=r'not installed: pip install "resnet_flax\[tensorboard\]"'
    ):
        import_tensorboard()
