"""MeDi's downstream protocol, as close as frozen features allow.

Its differences from the default comparison are kept: scores per patch, spread over seeds instead of patients, and other
numbers of patches in each training set. It serves the comparison with published numbers, not claims.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.metrics import matthews_corrcoef
from sklearn.utils.class_weight import compute_sample_weight

from latent_medi.core.errors import UserError, nearest
from latent_medi.core.progress import get_logger, progress
from latent_medi.evaluation.cohort.combinations import among
from latent_medi.evaluation.cohort.study import Study
from latent_medi.evaluation.downstream.classification_scores import quiet_balanced, scored_patches, site_averaged
from latent_medi.evaluation.downstream.records import MediProtocol, MediProtocolRow, MediTask, Pool
from latent_medi.evaluation.downstream.registry import REAL
from latent_medi.evaluation.downstream.training_sets import ProtocolSources
from latent_medi.evaluation.settings import MediProtocolSettings
from latent_medi.statistics.linear_probe import MAX_ITER
from latent_medi.statistics.logistic_regression import Problem, Scaling
from latent_medi.statistics.seeds import MeanOverSeeds

log = get_logger(__name__)
_DRAWS = 1000  # of sites, until every class has one


@dataclass(frozen=True)
class _Task:
    """A task with its patches.

    Args:
        name: Its name; empty for all classes.
        classes: Its classes, in order.
        train, test: Real rows of these classes.
        sites: Training sites, in order.
        numbers: Numbers of sites to draw, 0 for all.
        left_out: Those that are too large, or too small to have all classes.
    """

    name: str
    classes: np.ndarray
    train: np.ndarray
    test: np.ndarray
    sites: np.ndarray
    numbers: list[int]
    left_out: list[int]


def medi_tasks(study: Study, settings: MediProtocolSettings) -> list[_Task]:
    """The tasks of the settings.

    Raises:
        UserError: A list is empty or has a value twice; a task names an unknown class, the same twice or fewer than
            two, or has a class without a training or test patch; or no task has as many sites as are asked for, or a
            task suits none of the numbers.
    """
    for name in ("ratios", "pools", "max_real", "sites"):
        if not (given := getattr(settings, name)) or len(set(given)) < len(given):
            raise UserError(f"medi_protocol.{name} is {given}; it takes one or more different values.")
    found = []
    for name, values in settings.tasks.items() or [("", list(study.classes))]:
        if name and len(set(values)) < max(2, len(values)):
            raise UserError(f"medi_protocol.tasks: {name!r} needs two or more different classes, not {values}.")
        for value in values:
            if value not in study.classes:
                close = nearest(value, study.classes)
                raise UserError(f"medi_protocol.tasks: {name!r} names {value!r}, which is no class; {close}.")
        train, test = (among(rows, np.isin(study.class_labels, values)) for rows in (study.train, study.test))
        for rows, part in ((train, "training"), (test, "test")) if name else ():
            if lacking := sorted(set(values) - set(study.class_labels[rows])):
                raise UserError(f"medi_protocol.tasks: {name!r} has no {part} patch of {lacking[0]!r}.")
        sites = np.unique(study.site_labels[train])
        needed = _classes_needed(name, values)
        asked = [n for n in settings.sites if n != len(sites) or 0 not in settings.sites]  # 0 stands for these
        drawn = [n for n in asked if n <= len(sites) and _can_draw(study, train, needed, n, settings.seeds)]
        left_out = [n for n in asked if n not in drawn]
        found.append(_Task(name, np.unique(values), train, test, sites, drawn, left_out))
    most = max(found, key=lambda task: len(task.sites))
    for task in found:
        of = f"the task {task.name!r}" if task.name else "training"
        if not task.numbers or (task is most and max(settings.sites) > len(task.sites)):
            raise UserError(
                f"medi_protocol.sites asks for {max(task.left_out)} sites; {of} has {len(task.sites)} and "
                f"{len(task.classes)} classes, each of which needs a site.",
                "0 takes all.",
            )
        if task.left_out:
            log.info("MeDi's protocol: %s has %d sites, so not %s", of, len(task.sites), task.left_out)
    return found


def _classes_needed(name: str, classes: Sequence[str]) -> int:
    """Number of classes that drawn sites must have: all of a task, two without tasks."""
    return len(classes) if name else 2


def _can_draw(study: Study, rows: np.ndarray, classes: int, sites: int, seeds: int) -> bool:
    """Whether every seed finds so many sites with so many classes."""
    draws = (_draw_sites(study, rows, classes, sites, np.random.default_rng([seed, 31])) for seed in range(seeds))
    return all(draw is not None for draw in draws)


def _draw_sites(
    study: Study, rows: np.ndarray, classes: int, sites: int, rng: np.random.Generator
) -> np.ndarray | None:
    """Random sites that together have so many classes, the first such draw; 0 takes all, None stands for no draw."""
    pairs = set(zip(study.site_labels[rows].tolist(), study.class_labels[rows].tolist(), strict=True))
    names = np.unique(study.site_labels[rows])
    for _ in range(_DRAWS):
        kept = names[rng.permutation(len(names))[: sites or len(names)]]
        chosen = set(kept.tolist())
        if not sites or len({value for site, value in pairs if site in chosen}) >= classes:
            return np.asarray(kept)
    return None


def medi_protocol(sources: ProtocolSources, settings: MediProtocolSettings, device: str = "cpu") -> MediProtocol:
    """MeDi's: real patches of k random sites, at most ``max_real`` per class, and ⌊ratio·n⌋ synthetic ones.

    Logistic regression with balanced classes and C = 1 on unscaled features; test on all test patches of the task's
    classes. A seed draws the same sites and real patches for every training set and ratio; synthetic patches are drawn
    without repeats from a pool of a whole synthetic set, so there are fewer where it has not enough.

    Args:
        sources: Patches and samples.
        settings: The sweep.
        device: Torch device of the fits.

    Raises:
        UserError: See :func:`medi_tasks`; or no draw of sites has all classes.
    """
    study = sources.study
    tasks = medi_tasks(study, settings)
    sweeps = [_Sweep(task, sources, settings, device) for task in tasks]
    fits = [fit for sweep in sweeps for fit in sweep.fits()]
    for sweep, fit in progress(fits, desc="MeDi's protocol", unit="fits"):
        sweep.run(fit)
    rows = [row for sweep in sweeps for row in sweep.rows()]
    stuck = sum(sweep.not_converged for sweep in sweeps)
    records = {sweep.task.name: sweep.record() for sweep in sweeps}
    return MediProtocol(sources.fingerprint, scored_patches(study, study.test), stuck, rows, records)


def medi_real(
    study: Study, rows: np.ndarray, classes: int, sites: int, max_real: int, seed: int
) -> tuple[np.ndarray, list[str]]:
    """Real patches of random sites.

    Args:
        study: The cohort.
        rows: Rows to draw from.
        classes: Number of classes that random sites together must have; the draw is repeated until they do.
        sites: Number of sites; 0 takes all.
        max_real: Patches per class at most; 0 takes all.
        seed: Of the draw.

    Returns:
        Rows, ascending; and the sites.

    Raises:
        UserError: No draw has all classes.
    """
    rng = np.random.default_rng([seed, 31])
    kept = _draw_sites(study, rows, classes, sites, rng)
    if kept is None:
        raise UserError(
            f"medi_protocol.sites: {sites} random sites do not have all {classes} classes, in {_DRAWS} draws.",
            "Ask for more sites; 0 takes all.",
        )
    chosen, labels = among(rows, np.isin(study.site_labels, kept)), study.class_labels
    if not max_real:
        return chosen, kept.tolist()
    parts = [rng.permutation(chosen[labels[chosen] == value])[:max_real] for value in np.unique(labels[chosen])]
    return np.sort(np.concatenate(parts)), kept.tolist()


def _pool(study: Study, name: str, pool: str, classes: np.ndarray) -> np.ndarray:
    """Rows of a synthetic set that a task may draw from, ascending."""
    samples = study.synthetic[name]
    labels = samples.index[study.class_field].to_numpy(str)
    rows = np.flatnonzero(np.isin(labels, classes))
    if pool == "union":
        return rows
    train = among(study.train, np.isin(study.class_labels, classes))
    if study.site_field not in samples.fields:
        return rows[_in_proportion(labels[rows], study.class_labels[train])]
    seen = set(zip(study.class_labels[train].tolist(), study.site_labels[train].tolist(), strict=True))
    sites = samples.index[study.site_field].to_numpy(str)
    pairs = zip(labels[rows].tolist(), sites[rows].tolist(), strict=True)
    return rows[np.array([pair in seen for pair in pairs], bool)]


def _in_proportion(labels: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Random ones of each class in the proportions of ``wanted``, as many as there are: bool over ``labels``."""
    counts = {value: int((wanted == value).sum()) for value in np.unique(wanted)}
    own = {value: np.flatnonzero(labels == value) for value in counts}
    share = min((len(own[value]) / n for value, n in counts.items() if len(own[value])), default=0.0)
    keep: np.ndarray = np.zeros(len(labels), bool)
    for value, n in counts.items():
        keep[np.random.default_rng(41).permutation(own[value])[: int(share * n)]] = True
    return keep


_Key = tuple[int, int, float, str, Pool]
"""Number of sites, real patches per class, ratio, training set and pool."""
_Draw = tuple[int, int, int]
"""Number of sites, real patches per class, and seed."""


@dataclass(frozen=True)
class _Fit:
    """The fits of one training set: real patches alone, or with samples of a pool."""

    sites: int
    max_real: int
    ratio: float
    name: str
    pool: Pool
    seed: int

    @property
    def draw(self) -> _Draw:
        """What decides which real patches take part."""
        return self.sites, self.max_real, self.seed


class _Sweep:
    """All fits of a task."""

    def __init__(self, task: _Task, sources: ProtocolSources, settings: MediProtocolSettings, device: str) -> None:
        study, real, synthetic = sources.study, sources.real, sources.synthetic
        self.task, self.study, self.real, self.synthetic = task, study, real, synthetic
        self.settings, self.device = settings, device
        self.labels = {name: study.synthetic[name].index[study.class_field].to_numpy(str) for name in synthetic}
        self.pools: dict[tuple[str, Pool], np.ndarray] = {}
        self.pools |= {(n, p): _pool(study, n, p, task.classes) for n in synthetic for p in settings.pools}
        # About their mean, single precision loses nothing of the differences between patches.
        self.centre = real[task.test].mean(axis=0)
        self.test = real[task.test] - self.centre
        self.truth, self.test_sites = study.class_labels[task.test], study.site_labels[task.test]
        self.not_converged = 0
        self._scores: dict[_Key, list[tuple[float, float, float]]] = {}
        self._numbers: dict[_Key, list[tuple[int, int]]] = {}
        self._draws: dict[str, list[list[str]]] = {}
        self._gram: tuple[_Draw, np.ndarray] | None = None
        self._short: set[tuple[str, Pool]] = set()
        self._drawn: tuple[_Draw, np.ndarray] | None = None

    def fits(self) -> Iterator[tuple[_Sweep, _Fit]]:
        """Every fit, those of the same real patches in a row."""
        sets: list[tuple[float, str, Pool]] = [(0.0, REAL.name, "")] if 0 in self.settings.ratios else []
        sets += [(ratio, *pool) for ratio in self.settings.ratios if ratio for pool in self.pools]
        for sites in self.task.numbers:
            for most in self.settings.max_real:
                for seed in range(self.settings.seeds):
                    for ratio, name, pool in sets:
                        yield self, _Fit(sites, most, ratio, name, pool, seed)

    def run(self, fit: _Fit) -> None:
        """Fit and score."""
        chosen = self._real(fit)
        x, y = self.real[chosen], self.study.class_labels[chosen]
        if fit.pool:
            pool = self.pools[fit.name, fit.pool]
            order = np.random.default_rng([fit.seed, 37]).permutation(len(pool))
            extra = pool[order[: int(fit.ratio * len(chosen))]]
            self._warn_if_short(fit, int(fit.ratio * len(chosen)), len(pool))
            x = np.concatenate([x, self.synthetic[fit.name][extra]])
            y = np.concatenate([y, self.labels[fit.name][extra]])
        classes, codes = np.unique(y, return_inverse=True)
        if len(classes) < 2:
            raise UserError(
                f"MeDi's protocol with {fit.sites} sites and seed {fit.seed} has training patches of one class."
            )
        # The preconditioner of far fewer patches lacks directions: fits would take many times the iterations.
        gram = self._gram_of_real(fit, chosen) if 0 < len(x) - len(chosen) <= len(chosen) else None
        problem = self._problem(x, codes, gram)
        if len(x) == len(chosen):
            self._gram = fit.draw, problem.gram
        solution = problem.solve(1.0, MAX_ITER)
        self.not_converged += not solution.converged
        offset = solution.intercept + solution.weights @ self.centre.astype(np.float64)
        logits = self.test @ solution.weights.T.astype(np.float32) + offset
        found = classes[(logits[:, 0] > 0).astype(int) if len(classes) == 2 else logits.argmax(axis=1)]
        averaged = site_averaged(self.truth, found, self.test_sites)
        key = (fit.sites, fit.max_real, fit.ratio, fit.name, fit.pool)
        scores = (quiet_balanced(self.truth, found), averaged, float(matthews_corrcoef(self.truth, found)))
        self._scores.setdefault(key, []).append(scores)
        self._numbers.setdefault(key, []).append((len(chosen), len(y) - len(chosen)))

    def _problem(self, x: np.ndarray, codes: np.ndarray, gram: np.ndarray | None) -> Problem:
        weights = compute_sample_weight("balanced", codes)
        return Problem(x, codes, weights, Scaling.none(x.shape[1]), self.device, gram)

    def _gram_of_real(self, fit: _Fit, chosen: np.ndarray) -> np.ndarray:
        """Preconditioner of the fits with the same real patches: of these alone, so that the result of a fit does not
        depend on which others there are.
        """
        if self._gram is None or self._gram[0] != fit.draw:
            codes = np.unique(self.study.class_labels[chosen], return_inverse=True)[1]
            self._gram = fit.draw, self._problem(self.real[chosen], codes, None).gram
        return self._gram[1]

    def _warn_if_short(self, fit: _Fit, wanted: int, there: int) -> None:
        """Log, once for a pool, that it has fewer samples than a ratio asks for."""
        if wanted > there and (fit.name, fit.pool) not in self._short:
            self._short.add((fit.name, fit.pool))
            log.warning(
                "MeDi's protocol, task %s: the pool %s of %s has %d samples; ratio %g asks for %d, and gets all",
                *(self.task.name, fit.pool, fit.name, there, fit.ratio, wanted),
            )

    def _real(self, fit: _Fit) -> np.ndarray:
        """The real patches of a fit, drawn once."""
        if self._drawn is None or self._drawn[0] != fit.draw:
            needed = _classes_needed(self.task.name, self.task.classes.tolist())
            rows, sites = medi_real(self.study, self.task.train, needed, *fit.draw)
            self._drawn = fit.draw, rows
            draws = self._draws.setdefault(str(fit.sites), [])
            if fit.sites and len(draws) == fit.seed:
                draws.append(sites)
        return self._drawn[1]

    def rows(self) -> list[MediProtocolRow]:
        """The results, by number of sites, real patches, ratio and training set."""
        order = {ratio: i for i, ratio in enumerate(self.settings.ratios)}
        keys = sorted(self._scores, key=lambda key: order[key[2]])
        keys.sort(key=lambda key: (self.task.numbers.index(key[0]), self.settings.max_real.index(key[1])))
        return [self._row(*key) for key in keys]

    def _row(self, sites: int, most: int, ratio: float, name: str, pool: Pool) -> MediProtocolRow:
        key = (sites, most, ratio, name, pool)
        overall, averaged, mcc = (MeanOverSeeds.of(values) for values in zip(*self._scores[key], strict=True))
        return MediProtocolRow(
            training_set=name,
            sites=sites or len(self.task.sites),
            max_real=most,
            ratio=ratio,
            n_real=[real for real, _ in self._numbers[key]],
            n_synthetic=[synthetic for _, synthetic in self._numbers[key]],
            balanced_accuracy=overall,
            site_averaged_balanced_accuracy=averaged,
            mcc=mcc,
            task=self.task.name,
            pool=pool,
        )

    def record(self) -> MediTask:
        """The task's classes and patches."""
        task = self.task
        draws = {number: sites for number, sites in self._draws.items() if sites}
        test = scored_patches(self.study, task.test)
        return MediTask(task.classes.tolist(), len(task.sites), len(task.train), test, draws, task.left_out)
