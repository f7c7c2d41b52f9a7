"""The plane is that of training patches; its points are those of the sources, evenly thinned."""

from __future__ import annotations

import numpy as np
import pytest
from evaluation_world import World, filters
from sklearn.decomposition import PCA

from latent_medi.evaluation.cohort.open_study import open_study
from latent_medi.evaluation.evaluate import study_features
from latent_medi.evaluation.fidelity.projection import evenly, project


def test_points_are_a_pca_of_training_patches(world: World) -> None:
    settings = world.settings("projection")
    study = open_study(settings)
    features = study_features(study, filters(), settings, "cpu")
    record = project(study, features, "fingerprint", seed=0, most=10_000)
    pca = PCA(2, svd_solver="full").fit(np.asarray(features.real[study.train], np.float64))
    assert record.explained == pytest.approx(pca.explained_variance_ratio_, rel=1e-6)
    assert record.n_fitted == len(study.train)
    for name, vectors in (("real", features.real[study.reference]), ("medi", features.synthetic["medi"])):
        source = record.sources[name]
        expected = pca.transform(np.asarray(vectors, np.float64))
        signs = np.sign((expected * np.column_stack([source.x, source.y])).sum(axis=0))
        # PCA leaves the sign of an axis open; it must be the same for all sources.
        assert np.allclose(np.column_stack([source.x, source.y]), expected * signs, rtol=2e-3, atol=1e-3)
        assert source.n == len(vectors) == len(source.x)
    reference = study.index.iloc[study.reference]
    classes = [record.classes[c] for c in record.sources["real"].class_codes]
    sites = [record.sites[c] for c in record.sources["real"].site_codes]
    assert classes == list(reference["class"].astype(str))
    assert sites == list(reference["site"].astype(str))
    assert set(record.sources["cls"].site_codes) == {-1}  # it knows the class alone
    thinned = project(study, features, "fingerprint", seed=0, most=25)
    assert {len(s.x) for s in thinned.sources.values()} == {25}


def test_neighbours_stay_together_in_the_plane_of_tsne(world: World) -> None:
    settings = world.settings("projection")
    study = open_study(settings)
    features = study_features(study, filters(), settings, "cpu")
    record = project(study, features, "fingerprint", seed=0, most=60, method="tsne")
    assert record.by_tsne
    assert record.explained == [None, None]
    assert record.n_fitted == sum(len(source.x) for source in record.sources.values())
    again = project(study, features, "fingerprint", seed=0, most=60, method="tsne")
    assert again.sources == record.sources
    # Of each point's ten nearest in the plane, far more than chance are among its ten nearest by features.
    by_plane = np.concatenate([np.column_stack([s.x, s.y]) for s in record.sources.values()])
    plain = project(study, features, "fingerprint", seed=0, most=60)
    by_components = np.concatenate([np.column_stack([s.x, s.y]) for s in plain.sources.values()])
    near = [np.argsort(((p[:, None] - p[None]) ** 2).sum(-1), 1)[:, 1:11] for p in (by_plane, by_components)]
    shared = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(*near, strict=True)])
    assert shared > 3 * 10 / len(by_plane)


def test_thinning_is_even_over_combinations() -> None:
    rng = np.random.default_rng(0)
    classes = np.repeat([0, 1, 2], [3000, 600, 400])
    sites = rng.integers(0, 2, 4000)
    rows = evenly(classes, sites, 400, seed=1)
    assert len(set(rows.tolist())) == 400
    assert (np.sort(rows) == rows).all()
    for tumour in range(3):
        for site in range(2):
            cell = (classes == tumour) & (sites == site)
            assert abs(cell[rows].sum() - cell.sum() / 10) <= 1.5
    assert (evenly(classes, sites, 400, seed=1) == rows).all()
    assert (evenly(classes[:50], sites[:50], 400, seed=1) == np.arange(50)).all()
