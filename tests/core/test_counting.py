"""Counts in sentences."""

from latent_medi.core.counting import counted


def test_one_is_singular_and_thousands_are_marked() -> None:
    assert counted(1, "patient") == "1 patient"
    assert counted(0, "test patch") == "0 test patches"
    assert counted(1880, "patch") == "1,880 patches"
