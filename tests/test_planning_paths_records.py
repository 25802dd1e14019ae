"""A search's folder: one record a path, resumed where it stopped, refused where it is another search's."""

import json

import pytest

from cleave.architectures.linking.path import Path
from cleave.planning import GaussianProcess, PathRecord, SearchFolder, SearchSettings, search_paths

from .path_tables import BLOCKS, pair

IDENTITY = {
    "networks": {"local": "a" * 64, "host": "b" * 64},
    "data": {"digest": "c" * 64},
    "settings": {"links": {"style": "full", "kernel": 3}, "epochs": 10},
}


def test_a_record_is_one_file_for_each_path_and_reads_back(tmp_path):
    folder = SearchFolder(tmp_path / "search", IDENTITY)
    records = [
        PathRecord(Path(0, 1, 4, 5), 0.827, {"seconds": 12.5, "checkpoint": "paths/best.ckpt"}),
        PathRecord(Path(0, None, None, 5), 0.61),
    ]
    for record in records:
        assert folder.find(record.path) is None
        folder.write(record)
        assert folder.find(record.path) == record
    assert sorted(file.name for file in (tmp_path / "search/paths").iterdir()) == ["0-1-4-5.json", "0-x-x-5.json"]
    assert folder.records() == SearchFolder(tmp_path / "search", IDENTITY).records() == records
    content = json.loads((tmp_path / "search/paths/0-x-x-5.json").read_text())
    assert content == {"lout": 0, "hin": None, "hout": None, "lin": 5, "accuracy": 0.61, "details": {}}


class StoppedError(Exception):
    """As if someone had pulled the plug."""


@pytest.mark.parametrize("stop", [0, 1, 4, 6])
def test_a_search_goes_on_behind_its_last_record_to_the_same_end(tmp_path, stop):
    problem, accuracies = pair(0)
    settings = SearchSettings(seed=2, most=7, stop_after=5)
    asked = []

    def train(path):
        if len(asked) == stop:
            raise StoppedError
        asked.append(path)
        return PathRecord(path, accuracies[path])

    def search(folder, train):
        return search_paths(problem, folder.recorded(train), GaussianProcess(BLOCKS, BLOCKS), settings)

    whole = search_paths(problem, accuracies.__getitem__, GaussianProcess(BLOCKS, BLOCKS), settings)
    order = [one.path for one in whole.trained]
    assert len(order) > stop
    with pytest.raises(StoppedError):
        search(SearchFolder(tmp_path, IDENTITY), train)
    assert asked == order[:stop]
    rest = []

    def goes_on(path):
        rest.append(path)
        return PathRecord(path, accuracies[path])

    assert search(SearchFolder(tmp_path, IDENTITY), goes_on) == whole
    assert rest == order[stop:]
    assert search(SearchFolder(tmp_path, IDENTITY), train) == whole  # nothing is left to train


def changed(part, name, value):
    return {**IDENTITY, part: {**IDENTITY[part], name: value}}


def without_settings():
    return {part: values for part, values in IDENTITY.items() if part != "settings"}


@pytest.mark.parametrize(
    ("identity", "message"),
    [
        (changed("networks", "local", "d" * 64), f"networks.local differs; .* there and here: '{'a' * 64}' and 'dddd"),
        (changed("networks", "host", None), "networks.host differs; .* and None"),
        (changed("data", "digest", "e" * 64), "data.digest differs"),
        (changed("data", "classes", [0, 1]), r"data.classes differs; data.classes there and here: none and \[0, 1\]"),
        (changed("settings", "epochs", 20), "settings.epochs differs; settings.epochs there and here: 10 and 20"),
        (changed("settings", "links", {"style": "reduced", "kernel": 3}), "settings.links.style differs"),
        (changed("settings", "links", {"style": "reduced"}), "settings.links.style, settings.links.kernel differ;"),
        (
            {"networks": IDENTITY["networks"], "data": IDENTITY["data"]},
            "settings.links.style, .* differ; .* 'full' and none",
        ),
    ],
)
def test_a_folder_of_another_search_is_refused(tmp_path, identity, message):
    SearchFolder(tmp_path, IDENTITY).write(PathRecord(Path(0, 1, 4, 5), 0.8))
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.json")}
    with pytest.raises(ValueError, match=rf"is another search's: .*{message}"):
        SearchFolder(tmp_path, identity)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*.json")} == before


def test_an_identity_is_the_same_whatever_the_order_and_kind_of_sequences(tmp_path):
    SearchFolder(tmp_path, {**IDENTITY, "blocks": (1, 2)})
    SearchFolder(tmp_path, {"blocks": [1, 2], **dict(reversed(IDENTITY.items()))})


def test_records_without_an_identity_are_refused(tmp_path):
    SearchFolder(tmp_path, IDENTITY).write(PathRecord(Path(0, 1, 4, 5), 0.8))
    (tmp_path / "search.json").unlink()
    with pytest.raises(ValueError, match=r"holds records of paths, but no search\.json"):
        SearchFolder(tmp_path, IDENTITY)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema": 2}', "\x00"])
def test_a_damaged_identity_is_refused(tmp_path, content):
    (tmp_path / "search.json").write_text(content)
    with pytest.raises(ValueError, match="is damaged|is another search's"):
        SearchFolder(tmp_path, IDENTITY)


GOOD = {"lout": 0, "hin": 1, "hout": 4, "lin": 5, "accuracy": 0.8, "details": {}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "it is not JSON"),
        ("[]", "it must hold lout, hin, hout, lin, accuracy and details"),
        (json.dumps({**GOOD, "more": 1}), "it must hold lout"),
        (json.dumps({**GOOD, "accuracy": 82.7}), "its accuracy must be an accuracy of 0 to 1, got 82.7"),
        (json.dumps({**GOOD, "accuracy": None}), "its accuracy must be an accuracy of 0 to 1, got None"),
        (json.dumps({**GOOD, "lin": "5"}), r"its blocks must be whole numbers, got \[0, 1, 4, '5'\]"),
        (json.dumps({**GOOD, "hin": True}), "its blocks must be whole numbers"),
        (json.dumps({**GOOD, "lin": 4}), r"it is of the path \[0, 1, 4, 4\]"),
        (json.dumps({**GOOD, "details": []}), "its details must be an object"),
    ],
)
def test_a_damaged_record_is_refused_by_its_name(tmp_path, content, message):
    folder = SearchFolder(tmp_path, IDENTITY)
    folder.file(Path(0, 1, 4, 5)).write_text(content)
    for read in (lambda: folder.find(Path(0, 1, 4, 5)), folder.records):
        with pytest.raises(ValueError, match=rf"0-1-4-5\.json is damaged: {message}.*delete it"):
            read()


def test_what_is_no_accuracy_is_not_kept(tmp_path):
    folder = SearchFolder(tmp_path, IDENTITY)
    with pytest.raises(ValueError, match=r"what training the path \[0, 1, 4, 5\] gave must be an accuracy of 0 to 1"):
        folder.write(PathRecord(Path(0, 1, 4, 5), float("nan")))
    with pytest.raises(TypeError):
        folder.write(PathRecord(Path(0, 1, 4, 5), 0.8, {"module": object()}))
    assert folder.records() == []


def test_a_record_that_was_half_written_does_not_count(tmp_path, monkeypatch):
    folder = SearchFolder(tmp_path, IDENTITY)

    def pulled(self, target):
        raise StoppedError

    monkeypatch.setattr("pathlib.Path.replace", pulled)
    with pytest.raises(StoppedError):
        folder.write(PathRecord(Path(0, 1, 4, 5), 0.8))
    monkeypatch.undo()
    assert folder.find(Path(0, 1, 4, 5)) is None
    assert SearchFolder(tmp_path, IDENTITY).records() == []
