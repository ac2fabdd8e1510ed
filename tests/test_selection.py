"""The quick selection of the cases of a test, support/selection.py."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest

from support import selection


class Case(SimpleNamespace):
    """An item of pytest, as far as the selection looks at it."""

    __hash__ = object.__hash__

    def get_closest_marker(self, name: str) -> pytest.Mark | None:
        return pytest.mark.sample(self.sample).mark if name == "sample" and self.sample else None


def cases_of(sizes: tuple[int, ...], test: str = "test", sample: int = 0) -> list[Case]:
    """The items of a test whose parameters have these numbers of values."""
    values = [[object() for _ in range(n)] for n in sizes]
    return [
        Case(
            path="file",
            originalname=test,
            name=f"{test}[{'-'.join(map(str, where))}]",
            callspec=SimpleNamespace(params={f"p{i}": values[i][j] for i, j in enumerate(where)}) if sizes else None,
            sample=sample,
        )
        for where in itertools.product(*map(range, sizes))
    ]


def names(items) -> set[str]:
    return {item.name for item in items}


@pytest.mark.parametrize("sizes", [(5,), (3, 4), (4, 2, 6), (1, 1), (7, 1, 2)])
def test_each_value_is_selected_and_few_cases_are(sizes: tuple[int, ...]) -> None:
    cases = cases_of(sizes)
    kept = selection.selected(cases)
    covered = set().union(*map(selection.values_of, kept))
    assert covered == set().union(*map(selection.values_of, cases))
    assert max(sizes) <= len(kept) <= sum(sizes)


def test_tests_without_parameters_are_selected() -> None:
    (case,) = cases_of(())
    assert selection.selected([case]) == [case]


def test_the_selection_depends_on_the_names_alone() -> None:
    cases = cases_of((4, 4))
    assert (
        names(selection.selected(cases))
        == names(selection.selected(cases[::-1]))
        == names(selection.selected(cases_of((4, 4))))
    )


def test_mark_of_slow_tests() -> None:
    assert len(selection.selected(cases_of((30,), sample=4))) == 4
    assert len(selection.selected(cases_of((3,), sample=4))) == 3


def test_each_test_is_selected_on_its_own() -> None:
    first, second = cases_of((3, 2), "first"), cases_of((3, 2), "second", sample=2)
    kept = names(selection.quick([*first, *second]))
    assert sum(name.startswith("second") for name in kept) == 2
    assert 3 <= sum(name.startswith("first") for name in kept) <= 5
