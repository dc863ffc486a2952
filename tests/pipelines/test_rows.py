"""Which token rows go where, on an encoder whose rows tell what they are."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from pipelines.closed_form.rows import Nothing, RowChoice, TaskRows, encode_task
from toolkit.arch.base import Text
from toolkit.concepts import Concept, CustomizeTask, EraseTask, Subject
from toolkit.errors import UserError

LENGTH = 12


class Words:
    """A causal encoder of whole words: a row is a random vector keyed by the words up to it."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.vocabulary: dict[str, int] = {}

    def encode(self, prompts: list[str]) -> Text:
        self.seen += prompts
        words = [["<bos>", *prompt.split(), "<eot>"] for prompt in prompts]
        ids = torch.tensor(
            [[self.vocabulary.setdefault(word, len(self.vocabulary)) for word in (row + ["<eot>"] * LENGTH)[:LENGTH]] for row in words]
        )
        hidden = torch.stack([torch.stack([self.row(tuple(row[: i + 1].tolist())) for i in range(LENGTH)]) for row in ids])
        return Text(hidden, ids, torch.tensor([len(row) for row in words]))

    def row(self, ids: tuple[int, ...]) -> Tensor:
        return torch.randn(8, generator=torch.Generator().manual_seed(hash(ids) % 2**31))


def rows(arch: Words, *concepts: Concept, templates: tuple[str, ...] = (), nothing: Nothing = "empty_prompt", preserve=()) -> TaskRows:
    return encode_task(arch, EraseTask(concepts, preserve, templates), nothing)  # type: ignore[arg-type]


def hidden(arch: Words, prompt: str) -> Tensor:
    return arch.encode([prompt]).hidden[0]


@pytest.mark.parametrize(
    ("choice", "moved", "to"),
    [
        ("last_subject", [3], [2]),
        ("tail_aligned", range(3, 12), range(2, 11)),
        ("all", range(1, 12), [1, 2, 2, 3, 4, 5, 6, 7, 8, 9, 10]),  # a | red cat | on grass EOT pads
    ],
)
def test_a_concept_longer_than_its_anchor(choice: RowChoice, moved, to):
    arch = Words()
    source, target = rows(arch, Concept("red cat", anchor="dog"), templates=("a {} on grass",)).moved(choice)
    assert torch.equal(source, hidden(arch, "a red cat on grass")[list(moved)])
    assert torch.equal(target, hidden(arch, "a dog on grass")[list(to)])


@pytest.mark.parametrize(
    ("choice", "moved", "to"),
    [
        ("last_subject", [2], [3]),
        ("tail_aligned", range(2, 11), range(3, 12)),
        ("all", range(1, 12), [1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 11]),  # the last padding row repeats
    ],
)
def test_a_concept_shorter_than_its_anchor(choice: RowChoice, moved, to):
    arch = Words()
    source, target = rows(arch, Concept("cat", anchor="big dog"), templates=("a {} on grass",)).moved(choice)
    assert torch.equal(source, hidden(arch, "a cat on grass")[list(moved)])
    assert torch.equal(target, hidden(arch, "a big dog on grass")[list(to)])


def test_a_concept_as_long_as_its_anchor_goes_row_by_row():
    arch = Words()
    source, target = rows(arch, Concept("red cat", anchor="big dog"), templates=("a {} on grass",)).moved("all")
    assert torch.equal(source, hidden(arch, "a red cat on grass")[1:])
    assert torch.equal(target, hidden(arch, "a big dog on grass")[1:])


@pytest.mark.parametrize(("choice", "moved", "to"), [("last_subject", [2], [0]), ("tail_aligned", range(2, 12), range(10))])
def test_towards_the_empty_prompt_its_bos_stands_for_the_anchor(choice: RowChoice, moved, to):
    arch = Words()
    source, target = rows(arch, Concept("red cat"), templates=("{}",)).moved(choice)
    assert torch.equal(source, hidden(arch, "red cat")[list(moved)])
    assert torch.equal(target, hidden(arch, "")[list(to)])


@pytest.mark.parametrize(("nothing", "anchor"), [("empty_prompt", ""), ("template", "a on grass")])
def test_all_rows_towards_nothing(nothing: Nothing, anchor):
    """The words before the concept stay, the concept's go to what took their place, the others line up with what follows."""
    arch = Words()
    source, target = rows(arch, Concept("red cat"), templates=("a {} on grass",), nothing=nothing).moved("all")
    own, other = hidden(arch, "a red cat on grass"), hidden(arch, anchor)
    first = 1 if anchor == "" else 2
    assert torch.equal(source, own[1:])
    assert torch.equal(target, torch.cat([own[1:2], other[[first, first]], other[first : first + 8]]))


def test_words_templates_and_concepts_add_up():
    arch = Words()
    concepts = Concept("cat", synonyms=("red kitten",), anchor="dog"), Concept("van gogh", kind="style")
    source, target = rows(arch, *concepts).moved("last_subject")
    assert source.shape == target.shape == (5 * 2 + 5, 8)
    prompts = [template.format("van gogh") for template in concepts[1].templates]
    assert torch.equal(source[-5:], torch.stack([hidden(arch, prompt)[prompt.split().index("gogh") + 1] for prompt in prompts]))
    assert torch.equal(target[0], target[1])  # "dog", for the name and for its synonym


def test_kept_rows_are_the_empty_prompt_and_the_preserved_words_in_the_templates():
    arch = Words()
    text = rows(arch, Concept("cat"), templates=("{}", "a {}"), preserve=("bird",))
    empty, bare, one = (hidden(arch, prompt) for prompt in ("", "bird", "a bird"))
    assert torch.equal(text.keep("all"), torch.cat([empty, bare, one]))
    assert torch.equal(text.keep("to_eot"), torch.cat([empty, bare[:3], one[:4]]))


def test_every_prompt_is_encoded_once():
    arch = Words()
    rows(arch, Concept("cat", ("kitten",), "dog"), Concept("cow", anchor="dog"), preserve=("dog", "bird"))
    assert len(arch.seen) == len(set(arch.seen))


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (EraseTask((Concept("Cat", ("kitten",)),), preserve=("Kitten",)), "'Kitten' is both erased and preserved"),
        (EraseTask((Concept("cat", anchor="Cat"),)), "the anchor of 'cat' is 'Cat' itself"),
        (EraseTask((Concept("cat"),), templates=("a {} and a {}",)), "has 2 places"),
        (EraseTask((Concept("cat"),), templates=("two {}s",)), "joins 'cat' to the words beside it"),
        (CustomizeTask((Subject("<toy>", "dog", images=("toy.png",)),)), "given a CustomizeTask, needs an EraseTask"),  # type: ignore
    ],
)
def test_what_would_do_nothing_or_something_else_is_refused(task, message):
    with pytest.raises(UserError, match=message):
        encode_task(Words(), task, "empty_prompt")  # type: ignore[arg-type]


def test_rows_are_computed_where_float64_is():
    arch = SimpleNamespace(device=torch.device("mps"), encode=Words().encode)
    assert encode_task(arch, EraseTask((Concept("cat"),)), "template").empty.device.type == "cpu"  # type: ignore[arg-type]
