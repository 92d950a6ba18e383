"""``resnet-flax summary``."""

from resnet_flax.commands import summary


def test_the_command_prints_the_table(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["summary", "--model", "resnet18", "--image-size", "224"])
    summary.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9
    assert lines[3].split() == ["stage", "2", "(28,", "28,", "128)", "525,952", "411,041,792"]
    assert lines[-1].split() == ["total", "11,178,378", "1,734,890,496"]
