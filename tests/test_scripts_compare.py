"""The rate-accuracy report: what it reads, its means, fronts and interpolation, and what it writes."""

import csv
import dataclasses
import doctest
import json
import math
from pathlib import Path

import numpy as np
import pytest
import wandb
from PIL import Image

import cleave.reports.rates.fronts
from cleave.reports.csv_file import write_csv
from cleave.reports.plotting import COLORS, GREYS, byte_limits, styles
from cleave.reports.rates.collect import collect, reference_accuracy
from cleave.reports.rates.fronts import interpolate, pareto_front, settings, trade_offs
from cleave.reports.rates.plots import rate_plot, tradeoff_plot
from cleave.reports.rates.results import Point, write_results
from cleave.scripts.assembly.building import compose_config
from cleave.scripts.compare import check_output, compare, write_report

from .deployment_networks import make_bundle
from .offline_run import offline_runs
from .training_helpers import run_script

CODECS = [
    Point("webp", f"q{q}", a, b, encoder_params=0, backbone="net") for q, b, a in ((1, 112, 0.45), (50, 237, 0.76))
]


def run(
    accuracy=0.8, payload_bytes=256.0, method="hnd", label="4 bits", params=1000, backbone="net", **values
) -> Point:
    return Point(method, label, accuracy, payload_bytes, encoder_params=params, backbone=backbone, **values)


def results(folder: Path, *points: Point, kind: str = "run") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_results(folder / "results.json", points, kind)
    return folder / "results.json"


def written(file: Path, **changes) -> Path:
    """A results.json with one point, parts of it changed; ``None`` takes a key away."""
    point = {"method": "hnd", "label": "4 bits", "accuracy": 0.8, "payload_bytes": 256}
    values = {"schema": 1, "kind": "run", "points": [point]}
    for key, value in changes.items():
        (values if key in values else point)[key] = value
    file.write_text(json.dumps(values))
    return file


def pixels(picture: bytes | Path) -> np.ndarray:
    import io

    with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def has_color(image: np.ndarray, color: str) -> bool:
    return bool((image == [int(color[i : i + 2], 16) for i in (1, 3, 5)]).all(-1).sum() > 20)


def test_examples_in_docstrings_run():
    tested = doctest.testmod(cleave.reports.rates.fronts)
    assert (tested.attempted > 2, tested.failed) == (True, 0)


# --- the front ---------------------------------------------------------------------------------------------------


def dominated(cost, by) -> bool:
    return all(b <= c for b, c in zip(by, cost, strict=True)) and any(b < c for b, c in zip(by, cost, strict=True))


@pytest.mark.parametrize("seed", range(40))
def test_the_front_is_that_of_brute_force_with_ties_and_duplicates(seed):
    random = np.random.default_rng(seed)
    values = 3 if seed % 2 else 1000  # few values: many ties and equal points
    costs = [tuple(row) for row in random.integers(0, values, (random.integers(1, 40), 1 + seed % 4)).tolist()]
    assert pareto_front(costs) == [not any(dominated(cost, other) for other in costs) for cost in costs]


def test_no_costs_have_no_front_and_equal_ones_share_it():
    assert pareto_front([]) == []
    assert pareto_front([(1.0, 2.0)] * 3) == [True] * 3


def test_trade_offs_mark_the_front_of_each_backbone_alone():
    small, better = run(0.8, 128, params=10), run(0.9, 128, params=20)
    beaten, elsewhere = run(0.7, 129, params=10), run(0.7, 129, params=10, backbone="other")
    groups = trade_offs(settings([small, better, beaten, elsewhere, run(0.99, 1, params=None)]))
    found = {name: [(s.accuracy, s.encoder_params, front) for s, front in rows] for name, rows in groups.items()}
    assert found == {"net": [(0.8, 10, True), (0.7, 10, False), (0.9, 20, True)], "other": [(0.7, 10, True)]}


# --- means over seeds --------------------------------------------------------------------------------------------


def test_seeds_of_a_setting_are_averaged_with_their_sample_deviation():
    accuracies, lengths = [0.81, 0.84, 0.80], [250.0, 256.0, 259.0]
    points = [run(a, b, seed=i, checkpoint=f"{i}") for i, (a, b) in enumerate(zip(accuracies, lengths, strict=True))]
    (mean,) = settings([*points])
    assert mean.accuracy == pytest.approx(np.mean(accuracies))
    assert mean.accuracy_std == pytest.approx(np.std(accuracies, ddof=1))
    assert mean.payload_bytes == pytest.approx(np.mean(lengths))
    assert (mean.seeds, mean.seed, mean.checkpoint) == (3, None, None)


def test_one_seed_keeps_its_point_and_has_no_deviation():
    (alone,) = settings([point := run(seed=7, checkpoint="a.ckpt")])
    assert {f.name: getattr(alone, f.name) for f in dataclasses.fields(Point)} == dataclasses.asdict(point)
    assert (alone.seeds, alone.accuracy_std) == (1, None)


@pytest.mark.parametrize("change", [{"bits": 8}, {"label": "8 bits"}, {"backbone": "b"}, {"params": 9}, {"epochs": 9}])
def test_settings_that_differ_in_more_than_their_seed_stay_apart(change):
    assert len(settings([run(seed=0), run(seed=1, **change)])) == 2


def test_where_seeds_repeat_bytes_tell_settings_apart():
    points = [run(0.7 + 0.01 * seed + b / 10000, b, seed=seed) for seed in (0, 1) for b in (128, 256)]
    assert [(s.payload_bytes, s.seeds) for s in settings(points)] == [(128, 2), (256, 2)]
    assert [s.seeds for s in settings([run(0.7, seed=0), run(0.8, seed=0)])] == [1, 1]
    assert [s.seeds for s in settings([run(0.7), run(0.8)])] == [1, 1]


# --- equal bytes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_interpolation_is_numpys_over_the_upper_envelope(seed):
    random = np.random.default_rng(seed)
    count = 2 + seed % 9
    lengths, accuracies = random.choice(np.arange(16, 400), count, replace=False), random.random(count)
    points = [run(float(a), float(b), label=str(i)) for i, (a, b) in enumerate(zip(accuracies, lengths, strict=True))]
    kept = [i for i in range(count) if all(accuracies[i] > accuracies[lengths < lengths[i]])]
    kept.sort(key=lambda i: lengths[i])
    for at in [*lengths, *random.uniform(lengths.min(), lengths.max(), 20)]:
        wanted = np.interp(math.log2(at), np.log2(lengths[kept]), accuracies[kept])
        assert interpolate(points, at) == pytest.approx(wanted, rel=1e-12)
    assert interpolate(points, lengths.min() - 1e-6) is None
    assert interpolate(points, lengths.max() + 1e-6) is None


def test_interpolation_averages_seeds_before_it_takes_the_best():
    points = [run(0.6, 64, seed=0), run(0.8, 64, seed=1), run(0.5, 64, label="worse", seed=0)]
    assert interpolate(points, 64) == pytest.approx(0.7)
    assert interpolate(points, 65) is None
    assert interpolate([], 64) is None


def test_interpolation_refuses_a_mixture_and_no_bytes():
    with pytest.raises(ValueError, match="one method, got hnd, webp"):
        interpolate([run(), CODECS[0]], 256)
    for value in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="payload_bytes must be above 0"):
            interpolate([run()], value)


# --- what is read ------------------------------------------------------------------------------------------------


def test_folders_are_searched_and_what_is_met_twice_counts_once(tmp_path):
    one, two = run(seed=0), run(0.7, seed=1)
    file = results(tmp_path / "sweep/0", one)
    results(tmp_path / "sweep/1", two, dataclasses.replace(two, bits=2))
    results(tmp_path / "codecs", *CODECS, kind="baseline")
    points = collect([tmp_path / "sweep", file, tmp_path / "codecs/results.json"])
    baselines = [dataclasses.replace(p, kind="baseline") for p in CODECS]
    assert points == [one, two, dataclasses.replace(two, bits=2), *baselines]


def test_keys_that_are_missing_are_null_and_unknown_ones_are_left_alone(tmp_path):
    (point,) = collect([written(tmp_path / "r.json", label=None, temperature=4)])
    assert point == Point("hnd", "hnd", 0.8, 256)


def test_a_bundle_gives_the_points_that_its_export_measured(tmp_path):
    points = [run(seed=3), dataclasses.replace(run(0.7, seed=3), bits=2)]
    metrics = {"test/acc": 0.8, "points": [dataclasses.asdict(point) for point in points]}
    make_bundle(tmp_path / "runs/bundle", metrics=metrics)
    for path in ("runs", "runs/bundle", "runs/bundle/manifest.json"):
        assert collect([tmp_path / path]) == points
    results(tmp_path / "runs", run())  # the results of the run whose bundle this is say the same
    assert collect([tmp_path / "runs"]) == [run()]


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({"points": "none"}, "metrics.points must be a list of points"),
        ({"points": [3]}, "metrics.points must be a list of points"),
        ({"points": [{"method": "hnd", "payload_bytes": 32.0}]}, "has no accuracy"),
        ({"points": [{"method": "hnd", "accuracy": 50.0, "payload_bytes": 32.0}]}, "accuracy must be a number from 0"),
        ({"points": [{"method": "hnd", "accuracy": 0.5}]}, "has no payload_bytes"),
        ({}, "has no accuracy"),
    ],
)
def test_a_bundle_that_does_not_say_what_was_measured_is_named(tmp_path, metrics, words):
    make_bundle(tmp_path / "bundle", metrics=metrics)
    with pytest.raises(ValueError, match=rf"bundle/manifest\.json: {words}"):
        collect([tmp_path / "bundle"])


def test_an_unsplit_bundle_is_a_reference_and_no_point(tmp_path):
    make_bundle(tmp_path / "bundle", "whole", metrics={"test/acc": 0.875})
    assert reference_accuracy(f"{tmp_path}/bundle") == 0.875
    with pytest.raises(ValueError, match=r"manifest\.json: has no payload_bytes; .*reference=FILE"):
        collect([tmp_path / "bundle"])


def test_a_table_of_points_is_read_back_to_the_bit(tmp_path):
    random = np.random.default_rng(0)
    points = [run(float(random.random()), float(random.random() * 999), label=f"a,\"{i}'\n", seed=i) for i in range(9)]
    points += [dataclasses.replace(CODECS[0], kind="baseline", train_seconds=1e-9)]
    write_csv(tmp_path / "points.csv", [dataclasses.asdict(point) for point in points])
    assert collect([tmp_path / "points.csv"]) == points


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"accuracy": None}, r"point 1 \(4 bits\): has no accuracy"),
        ({"accuracy": 85.3}, r"accuracy must be a number from 0 to 1, got 85\.3"),
        ({"accuracy": -0.1}, "accuracy must be a number from 0 to 1"),
        ({"accuracy": "0.8"}, "accuracy must be a number from 0 to 1, got '0.8'"),
        ({"accuracy": True}, "accuracy must be a number from 0 to 1"),
        ({"accuracy": math.nan}, "NaN is not a JSON number"),
        ({"payload_bytes": None}, r"point 1 \(4 bits\): has no payload_bytes; .*reference=FILE"),
        ({"payload_bytes": 0}, "payload_bytes must be above 0"),
        ({"payload_bytes": -4}, "payload_bytes must be from 0 to below"),
        ({"payload_bytes": 10**400}, "payload_bytes must be from 0 to below"),
        ({"payload_bytes": "many"}, "payload_bytes must be a number or null, got 'many'"),
        ({"encoder_params": 1.5}, "encoder_params must be a whole number or null"),
        ({"epochs": -1}, "epochs must be from 0 to below"),
        ({"backbone": 20}, "backbone must be text or null"),
        ({"method": None}, "has no method"),
        ({"kind": "guess"}, "kind must be run or baseline, got 'guess'"),
        ({"schema": 2}, "has schema 2; this version of Cleave reads 1"),
        ({"schema": True}, "has schema True"),
        ({"points": []}, "list of at least one point"),
        ({"points": [3]}, "list of at least one point"),
    ],
)
def test_a_wrong_point_is_named_with_its_file(tmp_path, change, told):
    file = written(tmp_path / "r.json", **change)
    with pytest.raises(ValueError, match=rf"r\.json.*{told}"):
        collect([file])


@pytest.mark.parametrize("content", [b"", b"{", b'{"schema": 1, "schema": 1}', b"\xff\xfe", b"[" * 100_000, b"[]"])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "r.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"r\.json"):
        collect([tmp_path / "r.json"])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda text: text.replace("method,", "mthod,", 1), "is no rate_accuracy.csv"),
        (lambda text: text.splitlines()[0], "is no rate_accuracy.csv"),
        (lambda text: text.replace("0.8,", "0.8x,", 1), r"point 1 \(4 bits\): accuracy must be a number, got '0.8x'"),
        (lambda text: text.replace("0.8,", "nan,", 1), "accuracy must be a number from 0 to 1, got nan"),
        (lambda text: text.replace("256.0,", "inf,", 1), "payload_bytes must be from 0 to below"),
        (lambda text: text.splitlines()[0] + "\nhnd,4 bits\n", "has no accuracy"),
        (lambda text: text.rstrip() + ",1,2\n", "point 1.*more cells than columns"),
        (lambda text: text.replace("4 bits", '"4 bits'), "cannot be read"),
    ],
)
def test_a_damaged_table_is_named(tmp_path, change, told):
    write_csv(tmp_path / "p.csv", [dataclasses.asdict(run())])
    (tmp_path / "p.csv").write_text(change((tmp_path / "p.csv").read_text()))
    with pytest.raises(ValueError, match=rf"(?s)p\.csv.*{told}"):
        collect([tmp_path / "p.csv"])


def test_a_file_of_unreasonable_length_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("cleave.reports.rates.results.MAX_FILE_BYTES", 100)
    for file in (results(tmp_path, run()), tmp_path / "p.csv"):
        write_csv(tmp_path / "p.csv", [dataclasses.asdict(run())])
        with pytest.raises(ValueError, match="more than the 100 allowed"):
            collect([file])


def test_paths_without_results_say_what_was_looked_for(tmp_path):
    with pytest.raises(ValueError, match=r"inputs is empty; give inputs="):
        collect([])
    with pytest.raises(FileNotFoundError, match=r"there is no .*nowhere; inputs are run folders"):
        collect([tmp_path / "nowhere"])
    with pytest.raises(FileNotFoundError, match=r"neither a results\.json nor a bundle's manifest\.json"):
        collect([tmp_path])


def test_a_reference_is_one_accuracy(tmp_path):
    assert reference_accuracy(0.881) == 0.881
    assert reference_accuracy(str(written(tmp_path / "t.json", payload_bytes=None))) == 0.8
    with pytest.raises(ValueError, match="holds 2 points"):
        reference_accuracy(str(results(tmp_path, run(), run(0.9))))
    with pytest.raises(ValueError, match=r"t\.json, point 1.*: has no accuracy"):
        reference_accuracy(str(written(tmp_path / "t.json", accuracy=None)))
    with pytest.raises(ValueError, match=r"reference: accuracy must be a number from 0 to 1, got 88\.1"):
        reference_accuracy(88.1)


def test_results_that_are_not_json_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="train_seconds must be from 0"):
        run(train_seconds=math.inf)
    with pytest.raises(ValueError, match="kind must be"):
        write_results(tmp_path / "r.json", [run()], kind="teacher")
    assert list(tmp_path.iterdir()) == []


# --- what is drawn -----------------------------------------------------------------------------------------------

MANY = [
    run(0.5 + i / 100, b * (1 + i / 50), method=f"method_{i:02}", seed=seed, kind="baseline" if i > 9 else "run")
    for i in range(12)
    for b in (64, 128)
    for seed in (0, 1)
]
ODD = [run(method="_$x^$ {", label="$"), run(0.0, 1e7, method="w" * 90), run(1.0, 0.5, backbone=None)]
FORTY = [run(0.5 + i / 100, 300, method=f"a rather long name of method {i}", backbone=f"b{i % 2}") for i in range(40)]


@pytest.mark.parametrize(
    ("points", "log_x"),
    [([run()], False), (MANY, True), (ODD, True), (ODD, False), (FORTY, True)],
    ids=["one", "many", "odd names", "odd names, linear", "forty"],
)
def test_plots_have_their_size_and_nothing_is_cut_off(points, log_x):
    known = settings(points)
    for picture in (rate_plot(known, 0.88, "A title " * 12, log_x), tradeoff_plot(known, None, log_x)):
        image = pixels(picture)
        height, width, _ = image.shape
        assert width == 1350
        assert height >= 750
        inked = (image < 255).any(-1)
        assert 0.005 < inked.mean() < 0.9
        assert not inked[[0, 1, -2, -1]].any()
        assert not inked[:, [0, 1, -2, -1]].any()


def test_every_line_has_its_color_and_baselines_are_grey():
    baselines = [dataclasses.replace(point, kind="baseline") for point in CODECS]
    image = pixels(rate_plot(settings([run(0.8, 64), run(0.9), run(0.7, 99, "kd"), *baselines]), None, None, True))
    assert [has_color(image, color) for color in (*COLORS[:3], GREYS[0])] == [True, True, False, True]


def test_looks_are_apart_and_dashed_for_baselines():
    looks = styles({f"{i}": i >= 60 for i in range(80)})
    assert len(set(looks.values())) == 80
    assert {look.dash for name, look in looks.items() if int(name) >= 60} == {"--"}
    assert {look.dash for name, look in looks.items() if int(name) < 60} == {"-"}


@pytest.mark.parametrize("values", [[1], [112, 237], [64, 512], [100, 101], [0.3, 5e6]])
def test_the_axis_of_bytes_ends_at_powers_of_two_with_room(values):
    low, high = byte_limits(values)
    assert math.log2(low).is_integer()
    assert math.log2(high).is_integer()
    assert low < 0.95 * min(values)
    assert high > 1.05 * max(values)


def test_plots_are_the_same_bytes_whatever_the_users_settings():
    import matplotlib

    known = settings(MANY)
    plain = rate_plot(known, 0.9, "t", True), tradeoff_plot(known, "t", True)
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red", "savefig.bbox": "tight", "figure.dpi": 30}):
        assert (rate_plot(known, 0.9, "t", True), tradeoff_plot(known, "t", True)) == plain
        assert matplotlib.rcParams["font.size"] == 20


def test_error_bars_stand_where_seeds_differ():
    apart, alike = ([run(a, 256, seed=seed) for seed, a in enumerate(pair)] for pair in ((0.7, 0.9), (0.8, 0.8)))
    tall, flat = (
        (pixels(rate_plot(settings(p), None, None, True)) == [0x33, 0x22, 0x88]).all(-1) for p in (apart, alike)
    )
    plot = slice(0, 1000)  # without the legend
    assert np.ptp(np.nonzero(tall[:, plot])[0]) > 10 * np.ptp(np.nonzero(flat[:, plot])[0])


# --- what is written ---------------------------------------------------------------------------------------------


def test_a_report_without_parameters_has_no_trade_off_not_even_an_old_one(tmp_path):
    assert sorted(write_report(tmp_path, [run()], None)) == [
        "rate_accuracy.csv",
        "rate_accuracy.png",
        "tradeoff.csv",
        "tradeoff.png",
    ]
    write_report(tmp_path, [run(params=None)], None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rate_accuracy.csv", "rate_accuracy.png"]


@pytest.fixture
def sweep(tmp_path) -> Path:
    for seed, accuracy in enumerate((0.80, 0.84)):
        for bits in (2, 4):
            point = run(accuracy + bits / 100, 64.0 * bits, label=f"{bits} bits", bits=bits, seed=seed)
            results(tmp_path / f"sweep/{bits}_{seed}", point)
    results(tmp_path / "sweep/other", run(0.9, 128, backbone="other"))
    results(tmp_path / "codecs", *CODECS, kind="baseline")
    written(tmp_path / "teacher.json", payload_bytes=None, accuracy=0.881)
    return tmp_path


def test_the_script_writes_tables_and_plots_and_reads_its_own(sweep):
    overrides = [
        "inputs=[sweep,codecs/results.json]",
        "reference=teacher.json",
        "title='[draft] $x'",
        "backbone.name=net",
    ]
    told = run_script("compare", *overrides, "output=report", folder=sweep / "hydra")
    assert "Warning" not in told
    assert all(f"Written: report/{name}" in told for name in ("rate_accuracy.csv", "tradeoff.png"))
    assert "84.00 ± 2.83 %" in told
    assert "88.10 %" in told
    points = collect([sweep / "report/rate_accuracy.csv"])
    assert set(points) == {p for p in collect([sweep / "sweep", sweep / "codecs"]) if p.backbone == "net"}
    with (sweep / "report/tradeoff.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [(r["label"], r["encoder_params"], r["seeds"], r["front"]) for r in rows] == [
        ("q1", "0", "1", "1"),
        ("q50", "0", "1", "1"),
        ("2 bits", "1000", "2", "1"),
        ("4 bits", "1000", "2", "1"),
    ]
    assert float(rows[2]["accuracy"]) == pytest.approx(0.84)
    assert float(rows[2]["accuracy_std"]) == pytest.approx(np.std([0.82, 0.86], ddof=1))
    assert {pixels(file).shape for file in (sweep / "report").glob("*.png")} == {(750, 1350, 3)}
    again = compose_config("compare", ["inputs=x", "output=y", "reference=z"], sweep / "out")
    again.update({"inputs": str(sweep / "report/rate_accuracy.csv"), "output": str(sweep / "again")})
    again.update({"reference": str(sweep / "teacher.json"), "title": "[draft] $x"})
    files = compare(again)
    for name, file in files.items():
        assert file.read_bytes() == (sweep / "report" / name).read_bytes()


def test_a_mistake_is_one_line_and_nothing_is_written(sweep):
    (sweep / "sweep/2_0/results.json").write_text("{")
    told = run_script("compare", "inputs=[sweep]", "output=report", folder=sweep / "hydra", code=1)
    mistake, hint = told.splitlines()
    assert mistake.startswith("ValueError: sweep/2_0/results.json cannot be read: it is not JSON")
    assert hint.startswith("HYDRA_FULL_ERROR=1")
    assert not (sweep / "report").exists()


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"output": "{}/teacher.json"}, "must be a folder, but .*teacher.json is a file"),
        ({"output": "{}/teacher.json/deeper"}, "must be a folder, but .*teacher.json is a file"),
        ({"backbone": {"name": "nett"}}, "no point is of backbone.name=nett; there are net, other. Did you mean 'net'"),
        ({"inputs": None}, "inputs is empty"),
        ({"inputs": []}, "inputs is empty"),
        ({"reference": "{}/nowhere"}, "there is no .*nowhere"),
        ({"reference": 88}, "reference: accuracy must be a number from 0 to 1, got 88"),
    ],
)
def test_what_cannot_be_reported_is_refused_before_anything_is_written(sweep, overrides, told):
    cfg = compose_config("compare", ["inputs=x"], sweep / "out")
    cfg.update({"inputs": [f"{sweep}/sweep"], "output": f"{sweep}/report"})
    cfg.update({k: v.format(sweep) if isinstance(v, str) else v for k, v in overrides.items()})
    before = sorted(sweep.rglob("*"))
    with pytest.raises((ValueError, OSError), match=told):
        compare(cfg)
    assert sorted(sweep.rglob("*")) == before


def test_w_and_b_gets_plots_settings_and_tables(sweep, monkeypatch):
    for kind in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{kind}_DIR", str(sweep / "own"))
    overrides = [f"inputs=[{sweep}/sweep,{sweep}/codecs]", "logger=csv_wandb", "logger.wandb.mode=offline"]
    files = compare(compose_config("compare", overrides, sweep / "out"))
    (tracked,) = offline_runs(sweep)
    assert (tracked.exit_codes, tracked.run.job_type) == ([0], "compare")
    assert tracked.config["inputs"] == [f"{sweep}/sweep", f"{sweep}/codecs"]
    assert tracked.summary["best_accuracy/hnd"] == 0.9
    for name in ("rate_accuracy", "tradeoff"):
        (media,) = tracked.series(name)
        logged = tracked.folder / "files" / media["filenames"][0]
        assert logged.read_bytes() == files[f"{name}.png"].read_bytes()
        assert tracked.artifacts[name].type == "report"
        assert [entry.path for entry in tracked.artifacts[name].manifest.contents] == [f"{name}.csv"]
    (table,) = tracked.series("settings")
    table = json.loads((tracked.folder / "files" / table["path"]).read_text())
    points = [p for file in (f"{sweep}/sweep", f"{sweep}/codecs") for p in collect([file])]
    shown = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert shown == [dataclasses.asdict(setting) for setting in settings(points)]
    (metrics,) = (sweep / "out").rglob("metrics.csv")
    assert "best_accuracy/webp" in metrics.read_text()


def test_w_and_b_disabled_writes_the_report_alone(sweep):
    overrides = [f"inputs={sweep}/sweep", "logger=wandb", "logger.wandb.mode=disabled"]
    files = compare(compose_config("compare", overrides, sweep / "out"))
    assert sorted(path.name for path in (sweep / "out").iterdir()) == sorted(files)
    assert wandb.run is None


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_read(tmp_path):
    (tmp_path / "file").write_text("")
    places = [(f"{tmp_path}/file/new", "must be a folder, but .*file is a file")]
    places += [("/proc/new", "cannot be written: ")] if Path("/proc").is_dir() else []
    for place, words in places:
        with pytest.raises(OSError, match=f"^output={place} {words}"):
            compare(compose_config("compare", ["inputs=nowhere", f"output={place}"], tmp_path / "out"))
    check_output(tmp_path / "a/new/folder")
    assert not (tmp_path / "a").exists()
