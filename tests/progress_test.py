"""What a run says of an epoch under way."""

import time

from cifar_jax import progress


def test_without_a_terminal_it_is_lines_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(progress, "PERIOD", 0.05)
    with progress.progress("epoch 1/2", 4000, 0, True) as bar:
        for done in range(4):
            bar.set_postfix_str(f"loss {done}", refresh=False)
            bar.update(1000)
            time.sleep(0.03)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and "\r" not in err and 1 <= len(lines) < 4
    assert lines[0].startswith("epoch 1/2: ") and " of 4,000 images, 00:00 gone" in lines[0]
    assert "loss" in lines[0]


def test_an_epoch_of_seconds_says_nothing(capsys):
    with progress.progress("epoch 1/2", 10, 0, True) as bar:
        bar.update(10)
    with progress.progress("epoch 1/2", 10, 0, False) as bar:
        bar.update(10)
    assert capsys.readouterr() == ("", "")
