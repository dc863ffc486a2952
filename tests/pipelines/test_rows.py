"""Which token rows go where, on an encoder whose rows tell what they are."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from pipelines.closed_form.rows import Nothing, RowChoice, TaskRows, encode_concept, encode_task
from toolkit.arch.text import Segment, Stream, Text
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

    def text_streams(self) -> dict[str, Stream]:
        return {"hidden": Stream({}, lambda text: (Segment(text.hidden, text.ids, text.length),))}

    def row(self, ids: tuple[int, ...]) -> Tensor:
        return torch.randn(8, generator=torch.Generator().manual_seed(hash(ids) % 2**31))


def rows(arch: Words, *concepts: Concept, templates: tuple[str, ...] = (), nothing: Nothing = "empty_prompt", preserve=()) -> TaskRows:
    return encode_task(arch, EraseTask(concepts, preserve, templates), nothing)["hidden"]  # type: ignore[arg-type]


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
    assert torch.equal(text.keep("last_subject"), torch.cat([empty, bare[1:2], one[2:3]]))
    assert torch.equal(text.preserved("to_eot"), torch.cat([bare[:3], one[:4]]))
    assert rows(arch, Concept("cat")).preserved("all").shape == (0, 8)


@pytest.mark.parametrize("choice", ["last_subject", "tail_aligned", "all"])
def test_the_last_subject_tokens_among_the_moved_rows(choice: RowChoice):
    arch = TwoEncoders()
    concepts = Concept("red cat", anchor="big white dog"), Concept("cow")
    text = encode_task(arch, EraseTask(concepts, templates=("a {} on grass",)), "empty_prompt")["hidden"]  # type: ignore[arg-type]
    source, target = text.subjects(choice)
    first, second = arch.text_streams()["hidden"].segments(arch.encode(["a red cat on grass", "a cow on grass"]))
    assert torch.equal(source, torch.stack([first.rows[0, 3], first.rows[1, 2], second.rows[0, 2], second.rows[1, 1]]))
    moved = [torch.cat(pair) for pair in zip(*text.moved(choice), strict=True)]
    assert all(any(torch.equal(torch.cat(pair), both) for both in moved) for pair in zip(source, target, strict=True))


def test_every_prompt_is_encoded_once():
    arch = Words()
    rows(arch, Concept("cat", ("kitten",), "dog"), Concept("cow", anchor="dog"), preserve=("dog", "bird"))
    assert len(arch.seen) == len(set(arch.seen))


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (EraseTask((Concept("cat", anchor="Cat"),)), "the anchor of 'cat' is 'Cat' itself"),
        (EraseTask((Concept("cat"),), templates=("a {} and a {}",)), "has 2 places"),
        (EraseTask((Concept("cat"),), templates=("two {}s",)), "joins 'cat' to the words beside it"),
        (CustomizeTask((Subject("<toy>", "dog", images=("toy.png",)),)), "kind CustomizeTask, this method needs EraseTask"),  # type: ignore
    ],
)
def test_what_would_do_nothing_or_something_else_is_refused(task, message):
    with pytest.raises(UserError, match=message):
        encode_task(Words(), task, "empty_prompt")  # type: ignore[arg-type]


def test_rows_are_computed_where_float64_is():
    words = Words()
    arch = SimpleNamespace(device=torch.device("mps"), encode=words.encode, text_streams=words.text_streams)
    assert encode_task(arch, EraseTask((Concept("cat"),)), "template")["hidden"].empty.device.type == "cpu"  # type: ignore[arg-type]


class TwoEncoders(Words):
    """The same beside an encoder without BOS in which every row sees the whole prompt, and a pooled vector."""

    def text_streams(self) -> dict[str, Stream]:
        def both(text: Text) -> tuple[Segment, ...]:
            prompts = [tuple(ids[1:length].tolist()) for ids, length in zip(text.ids, text.length.tolist(), strict=True)]
            rows = torch.stack([torch.stack([self.row((*prompt, -i)) for i in range(LENGTH)]) for prompt in prompts])
            second = Segment(rows, torch.roll(text.ids, -1, 1), text.length - 1, leading=0, causal=False)
            return Segment(text.hidden, text.ids, text.length), second

        def pooled(text: Text) -> tuple[Segment, ...]:
            return (Segment(text.hidden[:, -1:], None, torch.ones(len(text), dtype=torch.long), leading=0, causal=False),)

        return {"hidden": Stream({}, both), "pooled": Stream({}, pooled)}


def test_rows_of_several_encoders_and_a_pooled_one() -> None:
    arch = TwoEncoders()
    task = EraseTask((Concept("red cat", anchor="dog"),), ("bird",), ("a {} on grass",))
    streams = encode_task(arch, task, "empty_prompt")  # type: ignore[arg-type]
    text = arch.encode(["a red cat on grass", "a dog on grass", "a bird on grass", ""])
    first, second = arch.text_streams()["hidden"].segments(text)

    source, target = streams["hidden"].moved("all")
    assert torch.equal(source, torch.cat([first.rows[0, 1:], second.rows[0]]))
    # a | red cat | on grass EOT pads: in the second encoder "a" too knows what follows, so it goes to the anchor's "a"
    assert torch.equal(target[11:], second.rows[1, [0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]])
    source, target = streams["hidden"].moved("last_subject")
    assert torch.equal(source, torch.stack([first.rows[0, 3], second.rows[0, 2]]))
    assert torch.equal(target, torch.stack([first.rows[1, 2], second.rows[1, 1]]))
    kept = torch.cat([first.rows[3], second.rows[3], first.rows[2, :6], second.rows[2, :5]])
    assert torch.equal(streams["hidden"].keep("to_eot"), kept)

    for choice in ("last_subject", "tail_aligned", "all"):
        source, target = streams["pooled"].moved(choice)
        assert torch.equal(source, first.rows[0, -1:]) and torch.equal(target, first.rows[1, -1:])
    assert torch.equal(streams["pooled"].keep("all"), first.rows[[3, 2], -1])


def test_nothing_in_an_encoder_without_bos_is_its_first_row() -> None:
    arch = TwoEncoders()
    streams = encode_task(arch, EraseTask((Concept("cat"),), (), ("a {}",)), "empty_prompt")  # type: ignore[arg-type]
    second = arch.text_streams()["hidden"].segments(arch.encode(["a cat", ""]))[1]
    source, target = streams["hidden"].moved("last_subject")
    assert torch.equal(source[1], second.rows[0, 1]) and torch.equal(target[1], second.rows[1, 0])


@pytest.mark.parametrize(
    ("anchor", "moved", "to"),
    [
        ("dog", [1, *range(4, 12)], [1, *range(3, 11)]),  # a | on grass EOT pads; one row of padding has no partner
        ("blue big dog", [1, *range(4, 11)], [1, *range(5, 12)]),
        ("red dog", [1, 2, *range(4, 12)], [1, 2, *range(4, 12)]),  # the token that both have in common moves too
        ("big cat", [1, 3, *range(4, 12)], [1, 3, *range(4, 12)]),
    ],
)
def test_matched_rows_are_those_of_the_tokens_in_common_and_the_padding(anchor, moved, to):
    arch = Words()
    source, target = rows(arch, Concept("red cat", anchor=anchor), templates=("a {} on grass",)).moved("matched")
    assert torch.equal(source, hidden(arch, "a red cat on grass")[moved])
    assert torch.equal(target, hidden(arch, f"a {anchor} on grass")[to])


def test_matched_rows_towards_the_empty_prompt_are_eot_and_the_padding():
    arch = Words()
    source, target = rows(arch, Concept("red cat"), templates=("a {}",)).moved("matched")
    assert torch.equal(source, hidden(arch, "a red cat")[4:])
    assert torch.equal(target, hidden(arch, "")[1:9])


def test_matched_rows_of_a_pooled_encoding_are_the_encoding():
    arch = TwoEncoders()
    streams = encode_task(arch, EraseTask((Concept("cat", anchor="dog"),), (), ("a {}",)), "empty_prompt")  # type: ignore[arg-type]
    text = arch.encode(["a cat", "a dog"])
    source, target = streams["pooled"].moved("matched")
    assert torch.equal(source, text.hidden[:1, -1]) and torch.equal(target, text.hidden[1:, -1])
    assert len(streams["hidden"].moved("matched")[0]) == (1 + 9) + (1 + 10)  # the second encoder has no BOS and one row more of padding


def test_a_methods_templates_take_the_place_of_the_concepts_own_but_not_of_the_tasks():
    arch, own = Words(), {"object": ("my {}",), "style": ("my {} art", "so {}")}
    concepts = Concept("cat", anchor="dog"), Concept("monet", anchor="manet", kind="style")
    given = encode_task(arch, EraseTask(concepts), "empty_prompt", own)["hidden"].moved("last_subject")[0]  # type: ignore[arg-type]
    wanted = [hidden(arch, "my cat")[2], hidden(arch, "my monet art")[2], hidden(arch, "so monet")[2]]
    assert torch.equal(given, torch.stack(wanted))
    given = encode_task(arch, EraseTask(concepts, (), ("the {}",)), "empty_prompt", own)["hidden"].moved("last_subject")[0]  # type: ignore[arg-type]
    assert torch.equal(given, torch.stack([hidden(arch, "the cat")[2], hidden(arch, "the monet")[2]]))


def test_the_prompts_of_one_concept_for_every_template_word_and_encoder():
    arch = TwoEncoders()
    placed = encode_concept(arch, Concept("red cat", ("kitten",)), ("a {}", "{} here"))  # type: ignore[arg-type]
    prompts = ["a red cat", "a kitten", "red cat here", "kitten here"]
    assert torch.equal(torch.stack([each.hidden for each in placed["hidden"][:4]]), arch.encode(prompts).hidden)
    assert [(each.start, each.end, len(each.ids or ())) for each in placed["hidden"][:4]] == [(2, 4, 5), (2, 3, 4), (1, 3, 5), (1, 2, 4)]
    assert [(each.start, each.end, len(each.ids or ())) for each in placed["hidden"][4:6]] == [(1, 3, 4), (1, 2, 3)]
    assert len(placed["hidden"]) == 8 and [each.ids for each in placed["pooled"]] == [None] * 4
