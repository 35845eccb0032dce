"""Every deliberate mistake in the list can still be applied."""

from __future__ import annotations

import pytest
from mutations import MUTATIONS, ROOT, Mutation


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_the_line_that_a_mutation_breaks_is_there_once(mutation: Mutation) -> None:
    assert (ROOT / mutation.file).read_text(encoding="utf-8").count(mutation.original) == 1
    file, _, test = mutation.test.partition("::")
    assert f"def {test.partition('[')[0]}" in (ROOT / file).read_text(encoding="utf-8")
