"""Which token rows of the encoded prompts a closed-form edit moves, where it moves them, and which it keeps.

A concept is put into prompt templates; a prompt's hidden state has one row per token. The rows of a concept prompt
move to rows of its anchor prompt (the same template around the anchor), paired by one of four choices:

last_subject  the concept's last token -> the anchor's last token: one row per prompt (UCE's current code).
tail_aligned  from the concept's last token to the end of the prompt, padding included -> the same from the anchor's
              last token, cut to equal length (UCE's code at the time of the paper, which RECE builds on).
all           every row but BOS. Rows before the concept stay where they are: a causal text encoder computes them
              without having seen it (under one that is not, they move to the anchor's at the same positions). The
              concept's rows move to the anchor's one by one when the two have as many tokens, else all to the anchor's
              last. Rows after it are aligned from the first row after the anchor's.
matched       the rows of the tokens that both prompts begin with and end with, and as much padding as both have: what
              stands around the concept forgets it, the concept's own rows stay (MACE).

BOS is never moved: it is the same row in every prompt, so moving it would move every prompt. What has one row for the whole
prompt, a pooled encoding, moves as a whole. A model whose layers read several encodings has rows of each.

A concept without an anchor moves to nothing: the empty prompt, or the template with the concept left out. Nothing has
no tokens; the row before its place (BOS in the empty prompt) is then its "last token", as in the official code, except
under `all`, where the concept's rows move to the row that has taken their place (EOT in the empty prompt).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from toolkit.arch.text import Segment, Text
from toolkit.concepts import Concept, EraseTask, Task, expect
from toolkit.errors import UserError

if TYPE_CHECKING:
    from toolkit.arch.base import Architecture

RowChoice = Literal["last_subject", "tail_aligned", "all", "matched"]
KeepChoice = Literal["all", "to_eot", "last_subject"]
Nothing = Literal["empty_prompt", "template"]
Templates = Mapping[Literal["object", "style"], Sequence[str]]

BATCH = 64  # prompts per call of the text encoder


@dataclass(frozen=True)
class Placed:
    """An encoded prompt and where its subject is.

    hidden: [L, d]. The subject's tokens are rows start to end - 1; start == end when the prompt has no subject.
    ids: the tokens from the first to EOT, None for a pooled encoding. leading and causal: see `Segment`.
    """

    hidden: Tensor
    start: int
    end: int
    ids: tuple[int, ...] | None
    leading: int = 1
    causal: bool = True

    @property
    def length(self) -> int:
        """Rows up to and including EOT; the rest is padding."""
        return len(self.hidden) if self.ids is None else len(self.ids)


@dataclass(frozen=True)
class TaskRows:
    """A task's prompts, encoded, as one stream of a model reads them.

    pairs: (concept prompt, anchor prompt) for every template and every word of every concept, and every segment.
    kept: the preserved prompts, for every segment. blank: the empty prompt, for every segment.
    """

    pairs: tuple[tuple[Placed, Placed], ...]
    kept: tuple[Placed, ...]
    blank: tuple[Placed, ...]

    @property
    def empty(self) -> Tensor:
        """The empty prompt's rows [L, d]."""
        return torch.cat([prompt.hidden for prompt in self.blank])

    def moved(self, choice: RowChoice) -> tuple[Tensor, Tensor]:
        """Rows to move [n, d] and where each goes [n, d]."""
        sources, targets = zip(*(_pair(concept, anchor, choice) for concept, anchor in self.pairs), strict=True)
        return torch.cat(sources), torch.cat(targets)

    def subjects(self, choice: RowChoice) -> tuple[Tensor, Tensor]:
        """Of the rows to move only each prompt's last subject token [n, d], and where it goes [n, d]."""
        sources, targets = [], []
        for concept, anchor in self.pairs:
            row = concept.end - 1 - concept.leading if choice == "all" else 0
            source, target = _pair(concept, anchor, choice)
            sources.append(source[row])
            targets.append(target[row])
        return torch.stack(sources), torch.stack(targets)

    def preserved(self, choice: KeepChoice) -> Tensor:
        """Rows of the preserved prompts [m, d]: all, those up to EOT, or the last token of what is preserved."""
        return torch.cat([self.empty[:0], *(_kept(prompt, choice) for prompt in self.kept)])

    def keep(self, choice: KeepChoice) -> Tensor:
        """Rows to keep [m, d]: those of the preserved prompts, and all of the empty prompt."""
        return torch.cat([self.empty, self.preserved(choice)])


@dataclass(frozen=True)
class TaskPrompts:
    """A task's prompts, encoded.

    pairs: (template, word, anchor's template, anchor) of every pair of prompts. kept: (template, word) of the preserved ones.
    index: prompt -> its place in `text`.
    """

    pairs: tuple[tuple[str, str, str, str], ...]
    kept: tuple[tuple[str, str], ...]
    index: Mapping[str, int]
    text: Text

    def rows(self, segments: Sequence[Segment]) -> TaskRows:
        """As one stream of a model reads them; its segments of `text`."""
        encodings = [_Encoding(segment, self.index) for segment in segments]
        return TaskRows(
            tuple((each.place(*pair[:2]), each.place(*pair[2:])) for each in encodings for pair in self.pairs),
            tuple(each.place(*job) for each in encodings for job in self.kept),
            tuple(each.place("{}", "") for each in encodings),
        )


def encode_task(arch: Architecture, task: Task, nothing: Nothing, own: Templates | None = None) -> dict[str, TaskRows]:
    """Encode every prompt of an erase task once. Returns stream -> its rows, see `Architecture.text_streams`.

    nothing and own: see `encode_prompts`.
    """
    prompts = encode_prompts(arch, task, nothing, own)
    return {name: prompts.rows(stream.segments(prompts.text)) for name, stream in arch.text_streams().items()}


def encode_prompts(arch: Architecture, task: Task, nothing: Nothing, own: Templates | None = None) -> TaskPrompts:
    """Encode every prompt of an erase task once.

    nothing: where concepts without an anchor go. own: the method's templates for each kind of concept, which take the place of
    the concepts' own; a task that has templates has the last word.
    """
    task = expect(EraseTask, task)
    templates = [task.templates or (own[concept.kind] if own else concept.templates) for concept in task.concepts]
    _check(task, templates)
    pairs = tuple(_jobs(task, templates, nothing))
    distinct = dict.fromkeys(template for each in templates for template in each)
    kept = tuple((template, word) for word in task.preserve for template in distinct)
    prompts = ["", *(fill(*job) for job in kept)]
    for template, word, anchor_template, anchor in pairs:
        prompts += [fill(template, word), fill(anchor_template, anchor), *around(template), *around(anchor_template)]
    index = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    return TaskPrompts(pairs, kept, index, encode(arch, list(index)))


def encode_concept(arch: Architecture, concept: Concept, templates: Sequence[str]) -> dict[str, tuple[Placed, ...]]:
    """Encode a concept's prompts: every template around every word. Returns stream -> the prompts, for every segment."""
    jobs = [(template, word) for template in templates for word in concept.words]
    prompts = [part for template, word in jobs for part in (fill(template, word), *around(template))]
    index = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    text = encode(arch, list(index))
    return {
        name: tuple(_Encoding(segment, index).place(*job) for segment in stream.segments(text) for job in jobs)
        for name, stream in arch.text_streams().items()
    }


def _check(task: EraseTask, templates: Sequence[Sequence[str]]) -> None:
    """Refuse what would silently do nothing or contradict itself."""
    for concept, own in zip(task.concepts, templates, strict=True):
        if concept.anchor is not None and concept.anchor.casefold() in {word.casefold() for word in concept.words}:
            raise UserError(f"the anchor of {concept.name!r} is {concept.anchor!r} itself; name something else to turn it into")
        for template in own:
            if template.count("{}") != 1:
                raise UserError(f"template {template!r} has {template.count('{}')} places for the concept, needs one; write {{}} once")


def _jobs(task: EraseTask, templates: Sequence[Sequence[str]], nothing: Nothing) -> Iterator[tuple[str, str, str, str]]:
    """(template, word, anchor's template, anchor's word) of every pair of prompts."""
    for concept, own in zip(task.concepts, templates, strict=True):
        for template in own:
            for word in concept.words:
                empty = not (concept.anchor or "").strip()
                yield template, word, "{}" if empty and nothing == "empty_prompt" else template, concept.anchor or ""


def fill(template: str, word: str) -> str:
    """The prompt: the template with the word in its place."""
    return " ".join(template.replace("{}", word).split())


def around(template: str) -> tuple[str, str]:
    """What stands before and after the concept in a template."""
    before, _, after = template.partition("{}")
    return before.strip(), after.strip()


def encode(arch: Architecture, prompts: Sequence[str]) -> Text:
    """The prompts, encoded in batches, where float64 can be computed."""
    text = Text.cat([arch.encode(prompts[first : first + BATCH]) for first in range(0, len(prompts), BATCH)])
    return text.to(exact_device(arch))


def exact_device(arch: Architecture) -> torch.device:
    """Where what the text encoder gives is computed with in float64: where it is, but Metal has no float64."""
    return torch.device("cpu") if arch.device.type == "mps" else arch.device


@dataclass(frozen=True)
class _Encoding:
    """One segment of all prompts. index: prompt -> its place in the batch."""

    segment: Segment
    index: Mapping[str, int]

    def up_to_eot(self, prompt: str) -> tuple[Tensor, int]:
        """A prompt's rows [L, d] and its length."""
        i = self.index[prompt]
        return self.segment.rows[i], int(self.segment.length[i])

    def place(self, template: str, word: str) -> Placed:
        """Find the subject's rows: those that what stands before and after it in the template leaves over."""
        leading, causal = self.segment.leading, self.segment.causal
        rows, length = self.up_to_eot(fill(template, word))
        if self.segment.ids is None:
            return Placed(rows, 0, len(rows), None, leading, causal)
        before, after = (self.up_to_eot(part)[1] for part in around(template))
        start, eot = before - 1, length - 1
        end = eot - (after - 1 - leading)
        ids, ids_before, ids_after = (self.segment.ids[self.index[part]] for part in (fill(template, word), *around(template)))
        same = torch.equal(ids[:start], ids_before[:start]) and torch.equal(ids[end:eot], ids_after[leading : leading + eot - end])
        if not same or (word.strip() and end <= start):
            raise UserError(f"template {template!r} joins {word!r} to the words beside it; put spaces around the {{}}")
        return Placed(rows, start, end, tuple(ids[:length].tolist()), leading, causal)


def _kept(prompt: Placed, choice: KeepChoice) -> Tensor:
    """One preserved prompt's rows that are kept [m, d]."""
    if choice == "last_subject":
        return prompt.hidden[prompt.end - 1 : prompt.end]
    return prompt.hidden if choice == "all" else prompt.hidden[: prompt.length]


def _pair(concept: Placed, anchor: Placed, choice: RowChoice) -> tuple[Tensor, Tensor]:
    """One prompt's rows to move and where they go, both [n, d]."""
    if choice == "matched":
        return _matched(concept, anchor)
    last, towards = concept.end - 1, max(anchor.end - 1, 0)
    if choice == "last_subject":
        return concept.hidden[last : last + 1], anchor.hidden[towards : towards + 1]
    length = len(concept.hidden)
    if choice == "tail_aligned":
        n = length - max(last, towards)
        return concept.hidden[last : last + n], anchor.hidden[towards : towards + n]
    before = (concept if concept.causal else anchor).hidden[concept.leading : concept.start]
    if concept.end - concept.start == anchor.end - anchor.start:
        subject = torch.arange(anchor.start, anchor.end)
    else:
        subject = torch.full((concept.end - concept.start,), max(towards, anchor.start))
    # The last padding rows repeat when the anchor is the longer one, so that no row is left without a target.
    after = torch.arange(anchor.end, anchor.end + length - concept.end).clamp(max=length - 1)
    return concept.hidden[concept.leading :], torch.cat([before, anchor.hidden[torch.cat([subject, after])]])


def _matched(concept: Placed, anchor: Placed) -> tuple[Tensor, Tensor]:
    """The rows of the tokens that two prompts share at their beginning and at their end, and padding, both [n, d]."""
    if concept.ids is None or anchor.ids is None:
        return concept.hidden, anchor.hidden
    own, other = len(concept.ids), len(anchor.ids)
    first = _common(concept.ids, anchor.ids)
    last = _common(concept.ids[first:][::-1], anchor.ids[first:][::-1])
    padding = len(concept.hidden) - max(own, other)

    def rows(prompt: Placed, length: int) -> Tensor:
        return torch.cat([prompt.hidden[prompt.leading : first], prompt.hidden[length - last : length + padding]])

    return rows(concept, own), rows(anchor, other)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences have in common from the start."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
