"""The report: what it shows of a whole run, that it stands alone, and how far it goes with broken ones."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plotly.offline import get_plotlyjs

from moe_dist.errors import ConfigError, MoeDistError
from moe_dist.report import curves, head, maps, page, read_runs, style, tables, write_report
from tests.unit.report.example import EXPERTS, LAYERS, STEPS, write_run

FILES = ("config.yaml", "metrics.jsonl", "load.jsonl", "events.jsonl", "summary.json", "traffic.json", "profile.json")


def _figures(html: str) -> int:
    return html.count("plotly-graph-div")


def test_a_whole_run_has_every_figure_and_runs_are_compared(tmp_path: Path) -> None:
    runs = read_runs([write_run(tmp_path / "a" / "demo"), write_run(tmp_path / "b" / "demo")])
    assert [run.label for run in runs] == ["a/demo", "b/demo"]
    html = page.page(runs)
    assert _figures(html) == 6 + 2 * 6
    assert "finished at step 40" in html
    assert "12,345" in html
    figure = curves.loss(runs)
    assert figure is not None
    assert len(figure.data) == 4
    assert list(figure.data[1].y) == [5.1 / step for step in (10, 20, 30, 40)]


def test_it_needs_no_network(tmp_path: Path) -> None:
    html = page.page(read_runs([write_run(tmp_path / "demo")]))
    own = html.replace(get_plotlyjs(), "")
    assert not re.search(r"""(src|href)=["'](?!data:)""", own)
    assert "default-src 'none'" in own


def test_figures_hold_what_the_files_say(tmp_path: Path) -> None:
    (run,) = read_runs([write_run(tmp_path / "demo")])
    load, traffic, membership = maps.load_map(run), maps.traffic(run), maps.membership(run)
    assert load is not None
    assert traffic is not None
    assert membership is not None
    assert len(load.data) == LAYERS
    z = np.array(load.data[0].z)
    assert z.shape == (EXPERTS, STEPS)
    np.testing.assert_allclose(z.mean(axis=0), 1, atol=1e-3)
    np.testing.assert_array_equal(traffic.data[0].z, [[0, 1], [2, 0]])
    still, moved = (np.array(data.z) for data in membership.data)
    assert still.shape == (EXPERTS, 1)
    assert moved[:, 0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert moved[:, 1].tolist() == [0, 0, 0, 1, 0, 1, 1, 1]
    assert list(membership.data[1].x) == [0, 20, STEPS]
    behind = maps.behind_map(run)
    assert behind is not None
    assert [np.array(data.z)[:, -1].tolist() for data in behind.data] == [[0, STEPS, 0], [0, 0, 1]]


def test_the_membership_figure_opens_at_the_layer_with_most_changes(tmp_path: Path) -> None:
    (run,) = read_runs([write_run(tmp_path / "demo")])
    figure = maps.membership(run)  # the example moves experts of its second layer only
    assert figure is not None
    assert [data.visible for data in figure.data] == [False, True]
    assert figure.layout.updatemenus[0].active == 1


def test_changes_of_a_layer_are_counted_by_expert() -> None:
    assert maps._changes([(0, [0, 0, 1, 1])]) == 0
    assert maps._changes([(0, [0, 0, 1, 1]), (20, [0, 1, 0, 1]), (40, [0, 1, 1, 0])]) == 2 + 2


def test_no_value_is_shown_as_python_writes_it(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "demo")
    (folder / "config.yaml").write_text("memory: {offload: true}\ncorpus: {paths: [a.txt, b.txt], name: null}\n")
    world = {"data": 1, "cluster": 4, "sliced": False, "replicas": None}
    (folder / "summary.json").write_text(json.dumps({"kind": "clustered", "world": world}))
    (folder / "events.jsonl").write_text(
        '{"event": "started", "step": 0, "job": null, "forced": false, "run": "demo"}\n'
    )
    runs = read_runs([folder, write_run(tmp_path / "other")])
    (layout,) = re.findall(r"<td>layout</td><td>(.*?)</td>", tables.comparison(runs))
    assert layout == "clustered, cluster 4"
    assert "<td>started</td><td>0</td><td>run: demo</td>" in tables.other_events(runs[0])
    shown = head.configuration(runs[0])
    assert "<td>true</td>" in shown
    assert "<td>a.txt, b.txt</td>" in shown
    (folder / "summary.json").write_text(json.dumps({"kind": "clustered", "world": {"shard": 2, "sliced": True}}))
    assert "clustered, shard 2, sliced" in tables.comparison(read_runs([folder]))


def test_losses_of_different_tokenizers_or_texts_have_a_note(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name) for name in "abc"]
    for folder, size in zip(folders, (4096, 4096, 2048), strict=True):
        (folder / "config.yaml").write_text(f"tokenizer: {{vocab_size: {size}}}\ncorpus: {{kind: text}}\n")
    runs = read_runs(folders)
    assert curves.not_comparable(runs[:2]) == ""
    assert "losses do not compare" not in page.page(runs[:2])
    assert curves.not_comparable(runs[1:]).startswith("Runs differ in their tokenizers ")
    assert curves.not_comparable(runs[1:]) in page.page(runs)
    (folders[1] / "config.yaml").write_text("tokenizer: {vocab_size: 2048}\ncorpus: {kind: stdlib}\n")
    assert curves.not_comparable(read_runs(folders)).startswith("Runs differ in their tokenizers and texts ")


def test_only_words_longer_than_a_column_are_broken() -> None:
    shown = tables.table(["parameters"], [["memory.device_budget_ratio"], ["of experts and clusters"]])
    assert shown.count("<td class=long>") == 1
    assert "<td class=long>memory.device_budget_ratio</td>" in shown
    assert "<th>parameters</th>" in shown


def test_a_long_run_of_a_large_model_stays_small(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "demo")
    line = {"experts": [[7] * 64] * 12}
    (folder / "load.jsonl").write_text("".join(json.dumps({"step": step, **line}) + "\n" for step in range(1000)))
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": step, "tokens": step, "train": {"loss": 1.5}}) + "\n" for step in range(20000))
    )
    (run,) = read_runs([folder])
    load, loss = maps.load_map(run), curves.loss([run])
    assert load is not None
    assert loss is not None
    assert sum(np.array(data.z).size for data in load.data) <= maps.MOST_CELLS
    assert np.array(load.data[0].z).shape == (64, maps.MOST_COLUMNS)
    assert len(loss.data[0].x) <= 3000
    assert loss.data[0].x[-1] == 19999


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(FILES), st.floats(0, 1), st.sampled_from([b"", b'"', b"\xff\xfe", b"[1]\n", b'{"step": {}}\n']))
def test_half_written_runs_are_shown_as_far_as_they_go(tmp_path: Path, name: str, part: float, end: bytes) -> None:
    shutil.rmtree(tmp_path / "demo", ignore_errors=True)
    file = write_run(tmp_path / "demo") / name
    content = file.read_bytes()
    file.write_bytes(content[: int(part * len(content))] + end)
    (run,) = read_runs([tmp_path / "demo"])
    assert _figures(page.page([run])) >= 4


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", ["[]", "null", '{"stages": 3, "ranks": 3, "step": "x", "members": 1}', None])
def test_files_of_another_shape_or_missing_do_no_harm(tmp_path: Path, name: str, content: str | None) -> None:
    file = write_run(tmp_path / "demo") / name
    file.unlink() if content is None else file.write_text(content)
    assert _figures(page.page(read_runs([tmp_path / "demo"]))) >= 4


def test_what_is_broken_is_said(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "demo")
    (folder / "summary.json").unlink()
    (folder / "events.jsonl").write_text('{"event": "fai')
    (run,) = read_runs([folder])
    assert run.status == "not finished: still running, or killed after step 40"
    assert run.problems == [
        "no summary.json: the run has not ended by itself",
        "events.jsonl: 1 of 1 lines are broken and left out",
    ]
    assert all(problem in page.page([run]) for problem in run.problems)


def test_a_run_that_was_asked_to_stop_has_ended_and_one_that_was_resumed_has_not(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "demo")
    (folder / "summary.json").unlink()
    (folder / "events.jsonl").write_text('{"event": "started", "step": 0}\n{"event": "stopped", "step": 20}\n')
    assert read_runs([folder])[0].status == "stopped at step 20"
    with (folder / "events.jsonl").open("a") as file:
        file.write('{"event": "resumed", "step": 20}\n')
    assert read_runs([folder])[0].status == "not finished: still running, or killed after step 40"


def test_words_of_a_run_are_never_code(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>"
    folder = write_run(tmp_path / "<b>demo")
    (folder / "events.jsonl").write_text(json.dumps({"event": "failed", "step": 3, "error": evil}) + "\n")
    (folder / "traffic.json").write_text(json.dumps({"stages": {evil: {"bytes": [[0, 1], [1, 0]]}}}))
    html = page.page(read_runs([folder]))
    assert evil not in html
    assert "<b>demo" not in html
    assert "&lt;script&gt;alert(1)" in html


def test_what_is_no_run_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere: is no run folder"):
        read_runs([tmp_path / "nowhere"])
    with pytest.raises(ConfigError, match=r"holds none of config\.yaml"):
        read_runs([tmp_path])
    run = read_runs([write_run(tmp_path / "demo")])
    with pytest.raises(MoeDistError, match="cannot be written"):
        write_report(run, tmp_path / "no folder" / "report.html")


def test_a_figure_that_is_missing_is_a_dash(tmp_path: Path) -> None:
    whole, broken = write_run(tmp_path / "whole"), write_run(tmp_path / "broken")
    (broken / "summary.json").unlink()
    rows = re.findall(r"<tr>(.*?)</tr>", tables.comparison(read_runs([whole, broken])))
    (loss,) = [row for row in rows if "validation loss" in row]
    assert loss == "<td>validation loss</td><td>3.4012</td><td>-</td>"


def test_the_head_has_identity_three_figures_and_what_differs(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    (second / "config.yaml").write_text("moe: {kind: clustered, rank: 8}\nname: other\n")
    html = page.page(read_runs([first, second]))
    cards = html.partition('<div class="cards">')[2].partition('<div class="grid">')[0]
    assert re.findall(r"<b>(.+?)</b>", cards) == 2 * ["3.4012", "14,321", "768"]
    assert "python 3.11.7" in cards
    differ = html.partition("Where the configurations differ")[2].partition("<h2>")[0]
    assert re.findall(r"<td>(.+?)</td>", differ) == ["moe.rank", "-", "8"]
    assert "<h3>At work</h3>" in html
    assert "2 rounds moved 9 experts" in html


def test_many_runs_are_rows_and_have_no_cards(tmp_path: Path) -> None:
    one = read_runs([write_run(tmp_path / "run")])
    assert tables.comparison(one * 100).count("<tr>") == 101  # with the head
    assert head.cards(one * 100) == ""


def test_clusters_have_colors_of_their_own_and_events_are_readable(tmp_path: Path) -> None:
    scale = style.categories(3)
    assert [edge for edge, _ in scale] == pytest.approx([0, 1 / 3, 1 / 3, 2 / 3, 2 / 3, 1])
    assert len({color for _, color in style.categories(8)}) == 8
    folder = write_run(tmp_path / "demo")
    event = {"event": "clustered", "step": 4, "output_errors": [[0.25] * 24, [0.5] * 24], "parts": {"inputs": 0.125}}
    with (folder / "events.jsonl").open("a") as events:
        events.write(json.dumps(event) + "\n")
    shown = tables.other_events(*read_runs([folder]))
    assert "output_errors: 48 numbers from 0.25 to 0.5, parts: inputs 0.125" in shown


def test_of_many_runs_only_comparisons_are_drawn(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"sweep-{number}") for number in range(9)]
    for number, run in enumerate(runs):
        (run / "config.yaml").write_text(f"moe: {{kind: clustered, rank: {number}}}\n")
    text = page.page(read_runs(runs))
    assert "<h1>9 runs</h1>" in text
    assert text.count('class="plotly-graph-div"') == 6
    assert text.count("<summary><b>sweep-") == 9
    compared, differing = text.split("Side by side")[1].split("Where the configurations differ")
    assert compared.count("<tr>") == 10
    assert "<tr><td>sweep-8</td><td>8</td></tr>" in differing
    assert text.count('"showlegend":false') >= 6
