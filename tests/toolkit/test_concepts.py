"""Tasks that contradict themselves are refused when they are made."""

import pytest

from toolkit.concepts import Concept, EraseTask
from toolkit.errors import UserError


@pytest.mark.parametrize("preserved", ["cat", "Kitten"])
def test_what_is_erased_cannot_be_preserved(preserved: str) -> None:
    with pytest.raises(UserError, match=f"'{preserved}' is both erased and preserved"):
        EraseTask((Concept("Cat", ("kitten",)), Concept("bird")), preserve=("dog", preserved))
    EraseTask((Concept("cat"),), preserve=("a cat on a mat",))


def test_templates_have_a_place_and_tasks_a_concept() -> None:
    with pytest.raises(UserError, match="has no place for the concept"):
        EraseTask((Concept("cat"),), templates=("a photo",))
    with pytest.raises(UserError, match="no concept given"):
        EraseTask(())
    with pytest.raises(UserError, match="empty concept ' '"):
        Concept("cat", (" ",))
