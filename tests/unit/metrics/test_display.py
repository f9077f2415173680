"""Progress and the final table: what a person or a log reads."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from moe_dist.errors import TrainingError
from moe_dist.metrics import Progress, render_summary
from moe_dist.metrics.at_work import words_at_work
from tests.unit.metrics.example import summary


def console(terminal: bool = False, width: int = 100) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=terminal, width=width), out


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_plain_lines_come_now_and_then_and_at_the_end() -> None:
    shown, out = console()
    clock = Clock()
    with Progress(100, shown, plain_every=10.0, clock=clock) as progress:
        for step in range(1, 101):
            progress.update(step, loss=3.0, tokens_per_second=1234.5)
            clock.now += 0.5
    got = out.getvalue().splitlines()
    assert [int(re.match(r"step (\d+)/100", line)[1]) for line in got] == [1, 21, 41, 61, 81, 100]  # type: ignore[index]
    assert got[0] == "step 1/100 · loss 3.000 · tokens/s 1,234 · starting"
    assert got[3] == "step 61/100 · loss 3.000 · tokens/s 1,234 · 0:20 left"
    assert got[-1].endswith("0:00 left")


def test_a_validation_loss_is_on_the_one_plain_line_of_its_step() -> None:
    shown, out = console()
    clock = Clock()
    with Progress(30, shown, plain_every=100.0, clock=clock) as progress:
        for step in (1, 10, 20, 25, 30):
            progress.update(step, loss=60.0 / step, evaluation_follows=step in (20, 30))
            clock.now += 60.0
            if step in (20, 30):
                progress.update(step, validation_loss=5.0 - step / 10)
    assert [line.rpartition(" · ")[0] for line in out.getvalue().splitlines()] == [
        "step 1/30 · loss 60.000",
        "step 20/30 · loss 3.000 · validation 3.000",  # printed although the last line is not long ago
        "step 30/30 · loss 2.000 · validation 2.000",
    ]


def test_figures_that_waited_for_a_validation_loss_are_printed_when_it_fails() -> None:
    shown, out = console()

    def work() -> None:
        with Progress(10, shown, plain_every=0.0) as progress:
            progress.update(4, loss=1.25, evaluation_follows=True)
            raise TrainingError("step 4: the validation loss is nan")

    with pytest.raises(TrainingError):
        work()
    assert out.getvalue() == "step 4/10 · loss 1.250 · starting\n"


def test_time_left_leaves_the_first_step_out() -> None:
    clock = Clock()
    progress = Progress(11, console()[0], clock=clock)
    clock.now = 100.0  # a slow start
    progress.update(1)
    assert progress.seconds_left() is None
    clock.now = 104.0
    progress.update(3)
    assert progress.seconds_left() == pytest.approx(16.0)


def test_a_terminal_gets_a_moving_display() -> None:
    shown, out = console(terminal=True)
    with Progress(10, shown) as progress:
        progress.update(4, loss=1.25, load_cv2=0.07)
        progress.note("evaluated [1]")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert "step 4/10" in text
    assert "loss 1.250" in text
    assert "balance cv² 0.070" in text
    assert "evaluated [1]" in text
    assert "\x1b[?25h" in out.getvalue()  # the cursor is back


def test_features_at_work_follow_the_figures_while_they_are() -> None:
    shown, out = console()
    offload = {"bytes_in": 3 * 2**20, "bytes_out": 2**19}
    line = {"load": {"dropped": 0.0123}, "train": {"skipped_steps": 2}, "offload": offload}
    progress = Progress(2, shown, plain_every=0.0)
    progress.update(1, loss=3.0, at_work=dict(words_at_work(line)))
    progress.update(1, validation_loss=4.0)
    progress.update(2, at_work=dict(words_at_work({"load": {"dropped": 0.0}, "train": {"skipped_steps": 0}})))
    words = "dropped 1.2% · skipped 2 steps · offload 3.0 MiB in, 512.0 KiB out"
    assert [line.rpartition(" · ")[0] for line in out.getvalue().splitlines()] == [
        f"step 1/2 · loss 3.000 · {words}",
        f"step 1/2 · loss 3.000 · validation 4.000 · {words}",
        "step 2/2 · loss 3.000",
    ]


def test_the_last_figures_stay_when_a_run_fails() -> None:
    shown, out = console(terminal=True)

    def work() -> None:
        with Progress(10, shown) as progress:
            progress.update(4, loss=1.25)
            raise TrainingError("step 4: loss is nan")

    with pytest.raises(TrainingError):
        work()
    assert out.getvalue().splitlines()[-1].rpartition("\x1b[2K")[2] == "step 4/10 · loss 1.250 · starting"


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_table_shows_every_figure(width: int) -> None:
    shown, out = console(width=width)
    render_summary(summary(), shown, Path("runs/demo"))
    text = " ".join(out.getvalue().split())
    for figure in (
        "3.4012",
        "30.00",
        "3,276,800",
        "14,321 tokens/s",
        "236.9 s: start 5.0, prepare 2.0, train 228.4, end 1.5; first step done after 7.3 s",
        "3.14 M",
        "1.23 M",
        "6.29 M",
        "19.6%",
        "768 B",
    ):
        assert figure in text
    for figure in ("2.1 GiB", "1.20e-05", "0.0123", "858.3 MiB", "4 = data 1 x cluster 4 x shard 1", "runs/demo/"):
        assert figure in text
    assert max(map(len, out.getvalue().splitlines())) <= width


def test_the_curve_is_thinned_but_keeps_its_ends() -> None:
    shown, out = console()
    render_summary(summary(), shown)
    steps = re.findall(r"^ +[\d,]+ +(\d+) +\d\.\d{4} ", out.getvalue(), re.MULTILINE)
    assert len(steps) == 10
    assert (steps[0], steps[-1]) == ("0", "400")


def test_missing_figures_are_dashes() -> None:
    shown, out = console()
    render_summary({"validation": {"loss": None, "curve": [{"loss": None}]}, "steps": 3}, shown)
    assert "validation loss -" in out.getvalue()
