"""A sweep that Optuna leads: it proposes settings by what earlier jobs came to; a stopped study goes on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution

TARGET = "hydra_plugins.cleave.OptunaSweeper"
"""What configs call the sweeper: Hydra takes no other names."""
RESULT = "optuna.yaml"
DIRECTIONS = ("maximize", "minimize")


class OptunaSweeper(Sweeper):
    """Runs the trials of an Optuna study, which is kept in a journal file of Optuna's own.

    The same command with the same folder (``hydra.sweep.dir``) goes on with the study until it has ``n_trials``; each
    trial is a job in the folder of its number. A trial whose job fails counts, but nothing is learned from it.

    Args:
        params: What is searched, by key: ``choice(2,4,8)``, ``range(1,9)``, ``interval(0.1,1)``,
            ``int(interval(1,64))``; ``tag(log,interval(1e-4,1e-1))`` is searched on a logarithmic scale.
        n_trials: Trials of the study in all.
        n_jobs: Trials that are proposed, and given to the launcher, together.
        direction: ``maximize`` or ``minimize``.
        storage: The journal file.
        study_name: The study's name in that file.
        sampler: Config of a sampler of Optuna's.

    Raises:
        ValueError: An argument is out of range.
    """

    hydra_context: HydraContext
    config: DictConfig
    launcher: Launcher

    def __init__(
        self,
        params: Mapping[str, Any] | None = None,
        n_trials: int = 20,
        n_jobs: int = 1,
        direction: str = "maximize",
        storage: str = "study.journal",
        study_name: str = "cleave",
        sampler: DictConfig | None = None,
    ) -> None:
        for name, value in (("n_trials", n_trials), ("n_jobs", n_jobs)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"hydra.sweeper.{name} must be a whole number of at least 1, got {value!r}")
        if direction not in DIRECTIONS:
            raise ValueError(f"hydra.sweeper.direction must be maximize or minimize, got {direction!r}")
        self.params, self.sampler = dict(params or {}), sampler
        self.n_trials, self.n_jobs, self.direction = n_trials, n_jobs, direction
        self.storage, self.study_name = Path(storage).expanduser(), study_name

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what Hydra hands over, and build the launcher."""
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Run trials until the study has as many as it should, and return the best value.

        Raises:
            ValueError: Optuna is missing, nothing is searched, or no trial came to a value.
        """
        fixed, space = self.searched(arguments)
        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        study = self.study()
        while (left := self.n_trials - len(study.trials)) > 0:
            trials = [study.ask(space) for _ in range(min(left, self.n_jobs))]
            batch = [[*fixed, *(f"{key}={trial.params[key]}" for key in space)] for trial in trials]
            self.validate_batch_is_legal(batch)
            jobs = self.launcher.launch(batch, initial_job_idx=trials[0].number)
            for trial, job in zip(trials, jobs, strict=True):
                self.tell(study, trial, job)
        return self.told(study, folder)

    def searched(self, arguments: Sequence[str]) -> tuple[list[str], dict[str, BaseDistribution]]:
        """Split overrides into those that all jobs have, and what is searched; the command line stands over the config.

        Raises:
            ValueError: Nothing is searched.
        """
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        given = parser.parse_overrides([*(f"{key}={value}" for key, value in self.params.items()), *arguments])
        by_key = {override.get_key_element(): override for override in given}
        space = {key: distribution(each) for key, each in by_key.items() if each.is_sweep_override()}
        if not space:
            raise ValueError(
                "hydra/sweeper=optuna has nothing to search; give a key several values, such as "
                "'codec.bits=choice(2,4,8)', or hydra.sweeper.params"
            )
        return [each.input_line for key, each in by_key.items() if key not in space], space

    def study(self) -> Study:
        """Open the study or begin it; what a stopped sweep was in the midst of has failed."""
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.storage.parent.mkdir(parents=True, exist_ok=True)
        study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(self.storage))),
            sampler=instantiate(self.sampler) if self.sampler else None,
            study_name=self.study_name,
            direction=self.direction,
            load_if_exists=True,
        )
        if study.direction.name.lower() != self.direction:
            raise ValueError(
                f"the study {self.study_name} in {self.storage} has the direction {study.direction.name.lower()}, not "
                f"{self.direction}; give another hydra.sweeper.study_name"
            )
        for trial in study.trials:
            if not trial.state.is_finished():
                study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        if study.trials:
            print(f"Goes on with the study in {self.storage}, which has {len(study.trials)} of {self.n_trials} trials")
            study.sampler.reseed_rng()  # else it would draw once more what it drew first
        return study

    def tell(self, study: Study, trial: Trial, job: JobReturn) -> None:
        """Tell the study what a trial's job came to."""
        from optuna.trial import TrialState

        value = job.return_value if job.status == JobStatus.COMPLETED else None
        if isinstance(value, int | float) and math.isfinite(value):
            study.tell(trial, float(value))
        else:
            study.tell(trial, state=TrialState.FAIL)
        words = " ".join(f"{key}={value}" for key, value in trial.params.items())
        came_to = f"{value:g}" if isinstance(value, int | float) else "failed"
        print(f"Trial {trial.number + 1} of {self.n_trials}, job {trial.number}: {words}: {came_to}", flush=True)

    def told(self, study: Study, folder: Path) -> float:
        """Write down the best trial, print it and return its value.

        Raises:
            ValueError: No trial came to a value.
        """
        from optuna.trial import TrialState

        if not study.get_trials(states=[TrialState.COMPLETE]):
            raise ValueError(f"none of the {len(study.trials)} trials came to a value; their folders are in {folder}")
        best = study.best_trial
        result = {"name": "optuna", "best_trial": best.number, "best_value": best.value, "best_params": best.params}
        OmegaConf.save(OmegaConf.create(result), folder / RESULT)
        words = " ".join(f"{key}={value}" for key, value in best.params.items())
        print(f"Best of {len(study.trials)} trials, job {best.number}: {words}: {best.value:g}")
        print(f"Written: {folder / RESULT}")
        return float(best.value or 0.0)


def distribution(override: Override) -> BaseDistribution:
    """Return what Optuna draws a swept override from.

    Raises:
        ValueError: Optuna is missing; or the sweep is of a form that it cannot draw from.
    """
    try:
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
    except ImportError:
        raise ValueError(
            "hydra/sweeper=optuna needs the package optuna, the extra `optuna`: pip install optuna"
        ) from None
    sweep: Any = override.value()
    if isinstance(sweep, IntervalSweep):
        kind = IntDistribution if isinstance(sweep.start, int) and isinstance(sweep.end, int) else FloatDistribution
        return kind(sweep.start, sweep.end, log="log" in sweep.tags)
    if isinstance(sweep, RangeSweep) and not sweep.shuffle and all_whole(values := list(sweep.range())):
        low, high = min(values), max(values)
        return IntDistribution(low, high, step=abs(int(sweep.step)))
    return CategoricalDistribution(tuple(override.sweep_string_iterator()))


def all_whole(values: Sequence[Any]) -> bool:
    """Return whether there are values, whole numbers all of them."""
    return bool(values) and all(isinstance(value, int) for value in values)
