"""The table of training sets that an evaluation compares: role, label, variants and how each is built.

A new baseline is one entry in :data:`KINDS` and one function that draws its patches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from latent_medi.core.progress import get_logger
from latent_medi.evaluation.cohort.combinations import Combination, describe
from latent_medi.evaluation.cohort.roles import LABELS, Roles
from latent_medi.evaluation.cohort.study import Study, SyntheticSet, held_out_with_class
from latent_medi.evaluation.downstream import baselines
from latent_medi.evaluation.downstream.records import Role
from latent_medi.evaluation.downstream.training_sets import (
    Add,
    Additions,
    Build,
    DerivedPatches,
    Sources,
    balanced,
    draw_of_class,
    pretrained_on_synthetic,
    real_alone,
    synthetic_alone,
    synthetic_rows,
    with_synthetic,
)
from latent_medi.statistics.differences import LARGEST_SHARE

log = get_logger(__name__)


@dataclass(frozen=True)
class Style:
    """How plots show a training set.

    Args:
        colour: Colour as "#rrggbb", from the palette of Okabe & Ito 2008.
        marker: Matplotlib's marker.
    """

    colour: str
    marker: str


CANDIDATE_STYLE = Style("#0072b2", "o")
BASELINE_STYLES = (Style("#d55e00", "s"), Style("#2f9bd6", "P"), Style("#7b3294", "X"), Style("#8c564b", "*"))
"""Styles of the synthetic baselines, in the order of their roles."""


@dataclass(frozen=True)
class TrainingSetKind:
    """One entry of the table.

    Args:
        name: Name of the training set; "{}" stands for the name of a synthetic set.
        role: Role; "candidate" also stands for the baselines among the synthetic sets.
        label: Name in figures and tables; "{}" as in ``name``.
        variants: How each variant is built. Of several, each test patient is classified by the one that is best on
            other test patients.
        derive: Computes patches from real ones, given cohort, combination, number, seed and σ of the stain; None if
            nothing is computed.
        unavailable: Gives the reason why it cannot be built, given the sources and the name of a synthetic set; empty
            if it can.
        in_words: Name in the verdict's sentence; empty takes the label.
        style: Colour and marker in plots.
        summarised: Whether the summary shows it among the main numbers.
        plotted: Whether the shift benchmark's curve shows it.
        decisive: Whether no verdict is given without it.
    """

    name: str
    role: Role
    label: str
    variants: Mapping[str, Build]
    derive: Callable[[Study, Combination, int, int, float], DerivedPatches | None] | None = None
    unavailable: Callable[[Sources, str], str] = field(default=lambda sources, synthetic: "")
    in_words: str = ""
    style: Style = Style("#1b1f24", "o")
    summarised: bool = False
    plotted: bool = False
    decisive: bool = False

    @property
    def phrase(self) -> str:
        """Name in a sentence."""
        return self.in_words or self.label

    @property
    def of_synthetic(self) -> bool:
        """Whether there is one for each synthetic set."""
        return "{}" in self.name


def _of_every_seed(sources: Sources, synthetic: str) -> list[tuple[str, SyntheticSet]]:
    """A synthetic set and its further training seeds; what is said of each starts with where it lies, unless it is the
    first.
    """
    study = sources.study
    further = [(f"in {samples.dataset.folder}: ", samples) for samples in study.further_seeds.get(synthetic, [])]
    return [("", study.synthetic[synthetic]), *further]


def _lacks_combination(sources: Sources, synthetic: str) -> str:
    for where, samples in _of_every_seed(sources, synthetic):
        lacking = [c for c in sources.additions.combinations if not len(synthetic_rows(samples, c))]
        if lacking:
            return f"{where}it has no sample for {describe(lacking[-1])}"
    return ""


def _lacks_class(sources: Sources, synthetic: str) -> str:
    if reason := _lacks_combination(sources, synthetic):
        return reason
    for where, samples in _of_every_seed(sources, synthetic):
        found = set(samples.index[sources.study.class_field].astype(str))
        if lacking := sorted(set(sources.labels.tolist()) - found):
            return f"{where}{synthetic} has no sample of {', '.join(lacking)}"
    return ""


REAL = TrainingSetKind(
    name="real",
    role="baseline",
    label="real only",
    in_words="the real patches alone",
    variants={"real": real_alone},
    style=Style("#59616b", "|"),
    summarised=True,
    plotted=True,
)
_SYNTHETIC = TrainingSetKind(
    name="{}",
    role="candidate",
    label="{}",
    variants={"{}": with_synthetic},
    unavailable=_lacks_combination,
    summarised=True,
    plotted=True,
)
KINDS: list[TrainingSetKind] = [
    REAL,
    TrainingSetKind(
        name="oversample",
        role="baseline",
        label="oversampling",
        variants={"duplicate": Add(draw_of_class), "balance": balanced},
        style=Style("#8a6d00", "v"),
        summarised=True,
        plotted=True,
    ),
    TrainingSetKind(name="reweight", role="baseline", label="reweighting", variants={"balance": balanced}),
    TrainingSetKind(
        name="stain_augmentation",
        role="baseline",
        label="stain augmentation",
        variants={"jitter": Add(baselines.draw_derived("stain_augmentation", "jitter"))},
        derive=baselines.stain_augmentation,
        unavailable=baselines.nothing_derived(
            "stain_augmentation", "no class of a held-out combination has a training patch"
        ),
    ),
    TrainingSetKind(
        name="nearest_site",
        role="baseline",
        label="nearest site",
        in_words="patches from the nearest site",
        variants={"nearest_site": Add(baselines.draw_nearest_site)},
        unavailable=baselines.no_nearest_site,
        style=Style("#e69f00", "^"),
        plotted=True,
    ),
    TrainingSetKind(
        name="stain_transfer",
        role="baseline",
        label="stain transfer",
        variants={m: Add(baselines.draw_derived("stain_transfer", m)) for m in ("reinhard", "macenko")},
        derive=baselines.stain_transfer,
        unavailable=baselines.nothing_derived(
            "stain_transfer", "no held-out combination names a site whose stain is known from training patches"
        ),
        style=Style("#a8467f", "^"),
        summarised=True,
        plotted=True,
        decisive=True,
    ),
    _SYNTHETIC,
    TrainingSetKind(
        name="synthetic_only_{}",
        role="ablation",
        label="{} alone",
        variants={"synthetic_only_{}": synthetic_alone},
        unavailable=_lacks_class,
    ),
    TrainingSetKind(
        name="pretrain_finetune_{}",
        role="ablation",
        label="{}, then real",
        variants={"pretrain_finetune_{}": pretrained_on_synthetic},
        unavailable=_lacks_class,
    ),
    TrainingSetKind(
        name="oracle",
        role="oracle",
        label="oracle",
        variants={"oracle": Add(baselines.draw_held_out)},
        unavailable=baselines.no_oracle,
        style=Style("#00785a", "D"),
        summarised=True,
        plotted=True,
    ),
]


@dataclass(frozen=True)
class Entry:
    """A training set of one evaluation.

    Args:
        name: Its name.
        kind: Its entry in the table.
        synthetic: The synthetic set that it is made of; empty for none.
    """

    name: str
    kind: TrainingSetKind
    synthetic: str

    @property
    def variants(self) -> dict[str, Build]:
        """By variant the function that builds it."""
        return {v.format(self.synthetic): build for v, build in self.kind.variants.items()}

    def role(self, roles: Roles) -> Role:
        """Its role, given those of the synthetic sets."""
        return "baseline" if self.kind is _SYNTHETIC and self.synthetic != roles.candidate else self.kind.role


def entries(synthetic: Iterable[str]) -> dict[str, Entry]:
    """Every training set by name, given the names of the synthetic sets."""
    names = list(synthetic)
    every = [Entry(k.name.format(s), k, s) for k in KINDS for s in (names if k.of_synthetic else [""])]
    return {entry.name: entry for entry in every}


def label_of(name: str) -> str:
    """Name of a training set, or of a synthetic set, in figures and tables."""
    for kind in KINDS:
        if kind.name == name:
            return kind.label
        prefix = kind.name.removesuffix("{}")
        if kind.of_synthetic and prefix and name.startswith(prefix):
            return kind.label.format(label_of(name.removeprefix(prefix)))
    return LABELS.get(name, name)


def style_of(name: str, roles: Roles) -> Style:
    """How plots show a training set, or a synthetic set."""
    if name == roles.candidate:
        return CANDIDATE_STYLE
    if name in roles.baselines:
        return BASELINE_STYLES[roles.baselines.index(name) % len(BASELINE_STYLES)]
    return next((kind for kind in KINDS if kind.name == name), _SYNTHETIC).style


def names_of(kinds: Iterable[TrainingSetKind], roles: Roles) -> list[str]:
    """Names of the training sets of some kinds, none of them an ablation; the candidate is the last synthetic one."""
    return [name for kind in kinds for name in (roles.names if kind.of_synthetic else [kind.name])]


def baseline_kinds() -> list[TrainingSetKind]:
    """The baselines without a generator, which a candidate must beat to be useful: those of the summary first, and of
    these the last in the table.
    """
    found = [kind for kind in reversed(KINDS) if kind.role == "baseline"]
    return sorted(found, key=lambda kind: not kind.summarised)


def summarised(kinds: Iterable[TrainingSetKind]) -> list[TrainingSetKind]:
    """Those of some kinds that the summary shows among the main numbers."""
    return [kind for kind in kinds if kind.summarised]


def comparisons(roles: Roles) -> list[tuple[str, str]]:
    """Pairs of training sets, of which the difference first − second is reported."""
    sets = [roles.candidate, *roles.baselines]
    others = [*(kind.name for kind in KINDS if kind.role == "baseline"), *roles.baselines]
    pairs = [(a, b) for a in [*sets, *(kind.name for kind in KINDS if kind.role == "oracle")] for b in others if a != b]
    ablations = [kind.name for kind in KINDS if kind.role == "ablation"]
    return pairs + [(name.format(s), b) for name in ablations for s in sets for b in (REAL.name, s)]


def plan_additions(study: Study, per_combination: int, seed: int, sigma: float) -> Additions:
    """Fix how many patches each held-out combination gets, and compute the derived patches, which all encoders share.

    Repeats draw from twice as many samples or derived patches as they add, so that they tell how much a draw changes.

    Args:
        study: The cohort.
        per_combination: Patches per combination; 0 takes half as many as the synthetic sets have, at most the median
            count of the class × site cells that have training patches.
        seed: Seed of the derived patches.
        sigma: σ of the stain augmentation.
    """
    combinations = held_out_with_class(study)
    table = study.index.iloc[study.train][[study.class_field, study.site_field]].astype(str)
    typical = int(table.value_counts().median())
    every = [*study.synthetic.values(), *(s for sets in study.further_seeds.values() for s in sets)]
    pools = [_pools(samples, combinations) for samples in every]
    counts = []
    for i in range(len(combinations)):
        halves = [max(1, pool[i] // 2) for pool in pools if pool[i]]
        counts.append(per_combination or min([typical, *halves]))
    for samples, pool in zip(every, pools, strict=True):
        for combination, found, n in zip(combinations, pool, counts, strict=True):
            if 0 < found < n / LARGEST_SHARE:
                text = (
                    "%s has %d samples of %s, of which %d are added: how much another draw would change cannot be "
                    "said, so its accuracies get no intervals. Generate at least twice as many."
                )
                log.warning(text, samples.name, found, describe(combination), n)
    result = Additions(combinations, counts)
    for kind in KINDS:
        if kind.derive is not None:
            result.derived[kind.name] = [
                kind.derive(study, combination, 2 * n, seed + i, sigma)
                for i, (combination, n) in enumerate(zip(combinations, counts, strict=True))
            ]
    return result


def _pools(samples: SyntheticSet, combinations: Sequence[Combination]) -> list[int]:
    """Samples that a set has for each combination; combinations that its model cannot tell apart share theirs."""
    known = [tuple(sorted((k, v) for k, v in c.items() if k in samples.fields)) for c in combinations]
    return [len(synthetic_rows(samples, c)) // known.count(key) for c, key in zip(combinations, known, strict=True)]
