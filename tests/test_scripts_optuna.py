"""The sweeper over Optuna: what it searches, how a study goes on, and what it says where Optuna is missing."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from cleave.scripts.assembly.starting.optuna_sweeper import OptunaSweeper, distribution
from cleave.scripts.assembly.starting.terminal import CONF

from .training_helpers import python_path, script

ROOT = Path(__file__).resolve().parent.parent
HERE = importlib.util.find_spec("optuna") is not None
# A command without a network: a parabola over what is searched, that fails where x is bad.
APP = """
import hydra
from cleave.scripts.assembly.starting.hydra_extensions import extend_hydra

@hydra.main(version_base="1.3", config_path="conf", config_name="app")
def main(cfg):
    if cfg.x == cfg.bad:
        raise RuntimeError("x is bad")
    return None if cfg.x == cfg.unmeasured else -float((cfg.x - 3) ** 2) * cfg.scale - abs(cfg.rate - 0.01)

extend_hydra()
main()
"""
CONFIG = """
defaults: [_self_, override hydra/sweeper: optuna]
hydra:
  searchpath: ["file://{conf}"]
  mode: MULTIRUN
  sweep: {{dir: sweep}}
  sweeper:
    n_trials: 6
    sampler: {{n_startup_trials: 4}}
    params: {{x: "range(0,6)", rate: "tag(log,interval(0.001,0.1))", name: "choice('a b',c)"}}
x: 0
rate: 1.0
scale: 1
bad: null
unmeasured: null
name: c
"""


@pytest.fixture
def app(tmp_path):
    pytest.importorskip("optuna")
    (tmp_path / "conf").mkdir()
    (tmp_path / "app.py").write_text(APP)
    (tmp_path / "conf/app.yaml").write_text(CONFIG.format(conf=CONF))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command, env = [sys.executable, "app.py", *arguments], {**os.environ, "PYTHONPATH": python_path()}
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)

    return run


def best(folder: Path) -> dict:
    return OmegaConf.to_container(OmegaConf.load(folder / "sweep/optuna.yaml"))


def test_a_study_goes_on_where_it_stopped(app, tmp_path):
    first = app()
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("Trial ") == 6
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir() if path.is_dir()) == list("012345")
    more = app("hydra.sweeper.n_trials=9")
    assert more.returncode == 0, more.stderr
    assert "which has 6 of 9 trials" in more.stdout
    assert more.stdout.count("Trial ") == 3
    assert len({line for line in (first.stdout + more.stdout).splitlines() if line.startswith("Trial ")}) == 9
    assert (tmp_path / "sweep/8").is_dir()
    found = best(tmp_path)
    assert set(found["best_params"]) == {"x", "rate", "name"}
    assert 0.001 <= found["best_params"]["rate"] <= 0.1
    values = [float(line.rsplit(": ", 1)[1]) for line in (first.stdout + more.stdout).splitlines() if "Trial " in line]
    assert found["best_value"] == pytest.approx(max(values), rel=1e-4)
    again = app("hydra.sweeper.n_trials=9")
    assert "Trial " not in again.stdout
    assert best(tmp_path) == found


def test_the_command_line_stands_over_what_the_config_searches(app, tmp_path):
    told = app("x=2", "rate=0.01", "name=c", "scale=choice(1,2)", "hydra.sweeper.direction=minimize")
    assert told.returncode == 0, told.stderr
    assert best(tmp_path)["best_params"] == {"scale": "2"}
    refused = app("x=2", "rate=0.01", "name=c", "scale=1")
    assert refused.returncode == 1
    assert "nothing to search" in refused.stderr
    other = app("x=2", "rate=0.01", "name=c", "scale=choice(1,2)")
    assert "has the direction minimize, not maximize" in other.stderr


def test_trials_without_a_value_count_and_are_passed_over(app, tmp_path):
    told = app("x=0,1,2,3", "bad=1", "unmeasured=2", "hydra.sweeper.n_trials=8", "hydra.sweeper.n_jobs=4")
    assert told.returncode == 0, told.stderr
    assert told.stdout.count("Trial ") == 8
    for line in told.stdout.splitlines():
        if line.startswith("Trial "):
            assert line.endswith(": failed") == ("x=1 " in line or "x=2 " in line)
    assert best(tmp_path)["best_params"]["x"] in ("0", "3")


@pytest.mark.skipif(HERE, reason="Optuna is installed")
def test_a_missing_optuna_is_one_line(tmp_path):
    given = ["hparams_search=optuna", "experiment=digits_hnd", f"hydra.sweep.dir={tmp_path}/sweep"]
    result = script("train", *given, cwd=tmp_path)
    assert result.returncode == 1
    mistake, hint = result.stderr.splitlines()
    assert hint.startswith("HYDRA_FULL_ERROR=1")
    assert "hydra/sweeper=optuna needs the package optuna, the extra `optuna`: pip install optuna" in mistake


@pytest.mark.parametrize("launcher", ["joblib", "submitit_slurm", "submitit_local"])
def test_a_missing_launcher_names_its_extra(launcher, tmp_path):
    extra = launcher.partition("_")[0]
    if importlib.util.find_spec("hydra_plugins") and importlib.util.find_spec(f"hydra_plugins.hydra_{extra}_launcher"):
        pytest.skip("the launcher is installed")
    result = script("train", "-m", f"hydra/launcher={launcher}", "seed=1,2", cwd=tmp_path)
    assert result.returncode == 1
    assert f"It comes with the extra `{extra}`: pip install hydra-{extra}-launcher" in result.stderr


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"n_trials": 0}, "n_trials must be a whole number of at least 1, got 0"),
        ({"n_jobs": True}, "n_jobs must be a whole number of at least 1, got True"),
        ({"direction": "up"}, "direction must be maximize or minimize, got 'up'"),
    ],
)
def test_settings_out_of_range_are_named(settings, told):
    with pytest.raises(ValueError, match=told):
        OptunaSweeper(**settings)


def test_every_form_of_sweep_has_its_distribution():
    distributions = pytest.importorskip("optuna").distributions
    forms = {
        "x=1,2,4": distributions.CategoricalDistribution(("1", "2", "4")),
        "x=choice(a,'b c')": distributions.CategoricalDistribution(("a", "b\\ c")),
        "x=range(1,9)": distributions.IntDistribution(1, 8),
        "x=range(1,9,3)": distributions.IntDistribution(1, 7, step=3),
        "x=range(0.5,2,0.5)": distributions.CategoricalDistribution(("0.5", "1.0", "1.5")),
        "x=interval(0,1)": distributions.FloatDistribution(0, 1),
        "x=int(interval(1,64))": distributions.IntDistribution(1, 64),
        "x=tag(log,interval(1e-4,1))": distributions.FloatDistribution(1e-4, 1, log=True),
        "x=tag(log,int(interval(1,64)))": distributions.IntDistribution(1, 64, log=True),
    }
    for override, expected in forms.items():
        (parsed,) = OverridesParser.create().parse_overrides([override])
        assert distribution(parsed) == expected, override


def test_the_preset_composes():
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("train", ["hparams_search=optuna"], return_hydra_config=True)
    sweeper = cfg.hydra.sweeper
    assert set(sweeper.params) == {"bottleneck.channels", "codec.bits", "training.optimizer.lr"}
    OptunaSweeper(sweeper.params, sweeper.n_trials, sweeper.n_jobs, sweeper.direction)
