"""The report in headless Chromium: it draws, says nothing on the console, and fits a phone."""

import json
import os
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

from moe_dist.report import read_runs, write_report
from tests.unit.report.example import write_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("CI"), reason="no Chromium here: apt-get install chromium"
)
PHONE, DESK = 390, 1280
# The report in a frame of each width, which a window can not be made as narrow as; what is seen ends up in the title.
FRAME = """<!DOCTYPE html><body><script>
const seen = {};
for (const width of [%s]) {
  const frame = document.createElement('iframe');
  frame.src = 'report.html'; frame.width = width; frame.height = 900;
  frame.onload = () => {
    const page = frame.contentDocument, plots = [...page.querySelectorAll('.js-plotly-plot')];
    // A heat map's parts, at once: nothing may wait for a correction after the page was loaded.
    const maps = plots.filter(plot => plot.data.some(trace => trace.type === 'heatmap')).map(plot => {
      const section = plot.closest('section').getBoundingClientRect(), shown = plot.data.find(trace => trace.visible);
      const parts = ['.heatmaplayer image', '.colorbar', '.updatemenu-header-group', '.xaxislayer-above'];
      return {
        parts: parts.map(name => plot.querySelector(name)?.getBoundingClientRect())
          .map(part => part ? part.left >= section.left && part.right <= section.right + 1 && part.width > 0 : null),
        steps: shown.x ? [...plot.layout.xaxis.range, Math.min(...shown.x), Math.max(...shown.x)] : null,
      };
    });
    setTimeout(() => {
      seen[width] = {
        maps,
        page: page.documentElement.scrollWidth, asked: page.querySelectorAll('.plotly-graph-div').length,
        drawn: plots.filter(plot => plot.querySelector('.main-svg')).length,
        widest: Math.max(...plots.map(plot => plot.querySelector('.main-svg').getBoundingClientRect().right)),
        cut: plots.filter(plot => plot.querySelector('.main-svg').getBoundingClientRect().right >
          plot.closest('section').getBoundingClientRect().right + 1).length,
      };
      document.title = JSON.stringify(seen);
    }, 500);
  };
  document.body.append(frame);
}
</script></body>"""


@pytest.mark.timeout(120)
def test_every_figure_is_drawn_within_the_screen_and_the_console_is_silent(tmp_path: Path) -> None:
    assert CHROMIUM is not None, "CI must have Chromium: .ci/run installs it"
    broken = write_run(tmp_path / "broken")
    (broken / "summary.json").unlink()
    (broken / "traffic.json").write_text("{")
    write_report(read_runs([write_run(tmp_path / "whole"), broken]), tmp_path / "report.html")
    figures = (tmp_path / "report.html").read_text().count('class="plotly-graph-div"')
    (tmp_path / "frame.html").write_text(FRAME % f"{PHONE}, {DESK}")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    logging = ["--enable-logging=stderr", "--log-level=0"]
    drawn = ["--virtual-time-budget=20000", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [CHROMIUM, *options, *logging, *drawn, "--dump-dom", f"file://{tmp_path}/frame.html"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title, done.stdout[-2000:] + done.stderr[-2000:]
    seen = json.loads(unescape(title[1]))
    for width in (PHONE, DESK):
        found = seen[str(width)]
        assert found["drawn"] == found["asked"] == figures
        assert found["page"] <= width
        assert found["widest"] <= width
        assert found["cut"] == 0
        assert len(found["maps"]) == 4 + 3
        for heat_map in found["maps"]:
            assert heat_map["parts"] == [True] * 4
            if heat_map["steps"] is not None:
                left, right, first, last = heat_map["steps"]
                assert left <= first < last <= right
    if folder := os.environ.get("MOE_DIST_SCREENSHOTS"):  # to look at, for example from CI
        Path(folder).mkdir(parents=True, exist_ok=True)
        for width in (PHONE, DESK):
            frame = f"<iframe src=report.html width={width} height=4000 style='border:0'>"
            (tmp_path / "shot.html").write_text(f"<!DOCTYPE html><body style='margin:0'>{frame}</body>")
            shot = [f"--screenshot={Path(folder).resolve() / f'report-{width}.png'}", "--hide-scrollbars"]
            subprocess.run(
                [CHROMIUM, *options, *shot, *drawn, f"--window-size={width},4000", f"file://{tmp_path}/shot.html"],
                capture_output=True,
                timeout=100,
                check=True,
            )
