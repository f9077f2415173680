"""Hub data sets: the one line without a network, the local cache, and names that do not exist."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from moe_dist.config import CorpusConfig, load_config
from moe_dist.data import hub
from moe_dist.data.corpora import open_corpus
from moe_dist.errors import ConfigError, DataError
from tests.unit.data.samples import sides_of

HUB = CorpusConfig(kind="hub", name="Some/wikitext", subset="raw", validation_split=None)


def documents_or_line(config: CorpusConfig) -> list[str] | str:
    try:
        return [document.text for side in sides_of(open_corpus(config)) for document in side]
    except DataError as error:
        return str(error)


def test_without_a_network_the_line_says_what_to_do(tmp_path: Path) -> None:
    # a process of its own: the hub's address is read when its library is imported; port 1 refuses every connection
    code = (
        "from tests.unit.data.test_hub import HUB, documents_or_line; import time; start = time.monotonic();"
        "line = documents_or_line(HUB); print(time.monotonic() - start, line)"
    )
    environment = {
        **os.environ,
        "HF_ENDPOINT": "http://127.0.0.1:1",
        "HF_HOME": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    seconds, line = run.stdout.strip().split(" ", 1)
    assert line.startswith("corpus.name=Some/wikitext (corpus.subset=raw, corpus.split=train) is not in this machine's")
    assert "HF_HOME" in line
    assert "corpus.kind=text" in line
    # the library's own retries take 24 s; this is no timing test, but a test that they are not made
    assert float(seconds) < 20


def test_a_name_server_that_hangs_does_not_hang_us(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    class Session:
        def head(self, url: str, timeout: float) -> None:
            time.sleep(60)

    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    monkeypatch.setattr(hub, "_PROBE_SECONDS", 0.05)
    assert not hub.hub_reachable()


def test_a_data_set_downloaded_before_is_used_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    rows = ["", " = One = \n", "", " First text . \n", "", " = Two = \n", "", " Second text . \n"]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    with hub.offline():
        builder = datasets.load_dataset_builder("json", data_files={"train": [str(source)]}, cache_dir=str(tmp_path))
        builder.download_and_prepare()
    # where the library keeps what it downloaded: <owner>___<name>/<subset>/<version>/<hash>/<name>-<split>.arrow
    kept = tmp_path / "Some___wikitext" / "raw" / "0.0.0" / "0123"
    kept.parent.mkdir(parents=True)
    Path(builder.cache_dir).rename(kept)
    (kept / "json-train.arrow").rename(kept / "wikitext-train.arrow")
    info = kept / "dataset_info.json"
    info.write_text(info.read_text().replace('"config_name": "default"', '"config_name": "raw"'))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "hub_reachable", lambda: False)
    found = documents_or_line(HUB)
    assert isinstance(found, list)
    assert sorted(found) == [" = One = \n\n First text . \n\n", " = Two = \n\n Second text . \n"]
    assert open_corpus(HUB).identity() == open_corpus(HUB).identity()


def test_what_the_hub_refuses_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(*names: Any, **settings: Any) -> None:
        raise ValueError("Unknown split \"validation\". Should be one of ['train'].\nmore")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.setattr(hub, "hub_reachable", lambda: True)
    line = documents_or_line(HUB.model_copy(update={"validation_split": "validation"}))
    assert "cannot be loaded: Unknown split" in line
    assert "\n" not in line


def test_offline_is_undone() -> None:
    import datasets
    import huggingface_hub

    switches: list[Any] = [datasets.config, huggingface_hub.constants]
    before = [switch.HF_HUB_OFFLINE for switch in switches]
    with hub.offline():
        assert all(switch.HF_HUB_OFFLINE for switch in switches)
    assert [switch.HF_HUB_OFFLINE for switch in switches] == before


@pytest.fixture
def local(tmp_path: Path) -> CorpusConfig:
    """A data set in a local folder, with a training split alone."""
    folder = tmp_path / "set"
    folder.mkdir()
    rows = "".join(json.dumps({"text": f"text {number}", "label": number}) + "\n" for number in range(20))
    (folder / "train.jsonl").write_text(rows)
    return CorpusConfig(kind="hub", name=str(folder), validation_split=None)


def test_a_local_folder_needs_no_network(local: CorpusConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "hub_reachable", lambda: pytest.fail("the hub was asked"))
    found = documents_or_line(local)
    assert isinstance(found, list)
    assert sorted(found) == sorted(f"text {number}" for number in range(20))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"split": "trian"}, 'corpus.split=trian) cannot be loaded: Unknown split "trian". Should be one of'),
        ({"validation_split": "validation"}, 'cannot be loaded: Unknown split "validation". Should be one of'),
        (
            {"subset": "other"},
            "corpus.subset=other, corpus.split=train) cannot be loaded: BuilderConfig 'other' not found",
        ),
        ({"text_column": "body"}, "has no column corpus.text_column=body; it has: text, label"),
        ({"text_column": "label"}, "row 0: corpus.text_column=label is int, not text; other columns: text"),
    ],
    ids=["split", "validation split", "subset", "column", "type"],
)
def test_the_cause_is_told_for_a_local_folder(local: CorpusConfig, change: dict[str, str], said: str) -> None:
    line = documents_or_line(local.model_copy(update=change))
    assert isinstance(line, str)
    assert said in line
    assert "\n" not in line
    assert "reached" not in line
    assert line.endswith("; null holds out a fraction instead") == ("validation_split" in change)


def test_differing_columns_and_scripts_of_a_local_folder_are_told(local: CorpusConfig, tmp_path: Path) -> None:
    folder = Path(str(local.name))
    (folder / "train-2.jsonl").write_text('{"text": "more", "new": "x"}\n')
    line = documents_or_line(local)
    assert "cannot be loaded: " in line
    assert "columns" in line or "column names" in line
    script = tmp_path / "scripted"
    script.mkdir()
    (script / "scripted.py").write_text("import datasets\n")
    line = documents_or_line(local.model_copy(update={"name": str(script / "scripted.py")}))
    assert "cannot be loaded: Dataset scripts are no longer supported" in line


def test_a_cached_data_set_without_the_split_tells_so_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(*names: Any, **settings: Any) -> None:
        raise ValueError("Couldn't find cache for Some/wikitext for config 'raw'")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.setattr(hub, "hub_reachable", lambda: False)
    assert "cannot be loaded: Couldn't find cache for Some/wikitext for config 'raw'" in documents_or_line(HUB)


def test_a_stream_holds_the_documents_of_the_download(local: CorpusConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked, load = [], datasets.load_dataset

    def noted(*names: Any, **settings: Any) -> Any:
        asked.append(settings["streaming"])
        return load(*names, **settings)

    monkeypatch.setattr(datasets, "load_dataset", noted)
    streamed = local.model_copy(update={"streaming": True})
    assert documents_or_line(streamed) == documents_or_line(local)
    assert asked == [True, False]
    before = open_corpus(streamed).identity()
    assert before == open_corpus(streamed).identity()
    with Path(str(local.name), "train.jsonl").open("a") as file:
        file.write('{"text": "one more", "label": 20}\n')
    assert open_corpus(streamed).identity() != before
    few = documents_or_line(streamed.model_copy(update={"max_bytes": 20}))
    assert isinstance(few, list)
    assert sum(map(len, few)) == 20


def test_a_stream_that_breaks_is_told_in_one_line(local: CorpusConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    class Broken:
        column_names = None

        def __iter__(self) -> Any:
            yield {"text": "fine"}
            raise ConnectionError("the hub is gone\nlong story")

        def select_columns(self, columns: list[str]) -> "Broken":
            return self

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: Broken())
    line = documents_or_line(local.model_copy(update={"streaming": True}))
    assert isinstance(line, str)
    assert line.endswith("cannot be loaded: the hub is gone")


def test_streaming_is_for_data_sets_and_needs_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    with pytest.raises(DataError, match=r"corpus\.streaming=true needs the Hugging Face hub, which .*: no route"):
        open_corpus(HUB.model_copy(update={"streaming": True})).identity()
    with pytest.raises(ConfigError, match=r"corpus\.streaming=true is read with corpus\.kind=hub only, not text"):
        load_config(None, ["corpus.paths=a.txt", "corpus.streaming=true"])
