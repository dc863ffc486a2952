"""MultiBooth: a word that an encoder makes of a subject's pictures, with low-rank keys and values; a module for each subject."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import gcd
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.concepts import CustomizeTask, Subject, Task, named
from toolkit.edits.chain import Chain
from toolkit.edits.token import TokenEdit
from toolkit.errors import UserError
from toolkit.method import option
from toolkit.prompt_search import LiveTokens, initial_rows
from toolkit.runs import seeded
from toolkit.world.scenes import ASSETS
from trainers.customize.textual_inversion import TEMPLATES
from trainers.image_features import CLIP, places_of
from trainers.loop import Batch, Objective
from trainers.parameters import LAYERS, Layers, layers_of
from trainers.preservation import PreservedDenoising, Preserving
from trainers.subjects import Photos, Prompts, Samples
from trainers.weights import LoraWeights, Trainable

if TYPE_CHECKING:
    from toolkit.edits.base import Edit, EditInfo
    from toolkit.model import Model


@dataclass(frozen=True)
class MultiBooth(Preserving):
    """MultiBooth: Towards Generating All Your Concepts in an Image from Text, Zhu et al., arXiv 2404.14239, its learning of one concept.

    Equation
        min_{E, A, B}  E_{i, y, eps, t} || eps - e(z_t, t, c(y; u_i)) ||^2 + norm_weight || v_i ||^2
        v_i = mean_k o_k,   O = E(xi_i, l, W),    u_i = v_i |c_l| / |v_i|
        where e is the denoiser with each key and value of its cross-attention W0 + B A, z the latent of picture i, y a prompt with the
        subject's word and its class, u_i the embedding that the word has at this picture, and |c_l| the norm of the class word's own
        embedding. E is the encoder (a Q-Former): its queries W attend, with the class name l, to themselves, and then to what a frozen
        CLIP sees at each place of the picture, xi_i. On a model that predicts velocity the same is done in velocities.
        The edit has the word u = v |c_l| / |v| for v the mean of all v_i, and the low-rank change. To draw several subjects, each is
        given to a region of the image, see `pipelines/attention/regional.py`.

    Shapes
        xi: [places, k], of the CLIP. W, O: [num_queries, d], v, u: [d], l: [tokens, d], d the width of the token embedding; for each
        text encoder an E of its own. A: [rank, in], B: [out, rank]. z, eps: [batch, c, h', w'] scaled latents.

    Defaults
        The paper's: rank 16, norm_weight 0.01, 900 steps at 8e-5, textual inversion's templates. One picture in a step and 16 queries,
        BLIP-Diffusion's number, are chosen by us: the paper gives neither, and no code is released. It draws in 100 steps with a guidance
        scale of 7.5.

    Deviations
        The paper's encoder is a Q-Former, which others start from BLIP's weights. Here it has query_layers layers, by default the one
        self-attention and the one cross-attention of the paper's text, its queries start from the class name's embeddings, and what a
        layer adds starts at zero: the word is its class's at first. It reads the class name by the model's own embeddings. v of several
        pictures is their mean: the paper keeps one embedding and does not say which. Of a class name of several tokens |c_l| is the
        mean of their norms. The keys and values of the cross-attention are adapted, which is where the paper writes of them and what a
        region can hold; the paper's 7 MB for one subject have room for those of the self-attention too. With other `layers`
        more can be drawn, and no region holds it. The class is preserved if asked for (prior), which is not in the paper. One subject in a
        run: each
        subject has a module of its own. The posterior's mean is encoded. Timesteps are stratified over the batch by default: each is
        still uniform. With masks the error counts on the subject only. A picture's own caption is used when it has one.
    """

    clip: str | None = option(None, f"CLIP {CLIP}")
    layers: Layers = option("keys_and_values", f"what is adapted: {LAYERS}")
    rank: int = option(16, "rank of the change of each layer")
    num_queries: int = option(16, "queries of the encoder, the mean of whose outputs is the word")
    query_layers: int = option(1, "layers of the encoder")
    norm_weight: float = option(0.01, "weight of the squared norm of the word before it is scaled to its class's")
    max_train_steps: int = option(900, "optimizer steps")
    learning_rate: float = option(8e-5, "step size")

    architectures: ClassVar = ("sd", "sdxl")
    paper: ClassVar = "arXiv:2404.14239"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "rank", "num_queries", "query_layers")
        self.at_least(0, "norm_weight")
        if self.prior == "prediction":
            raise UserError("prior is prediction, and the model before does not know the pictures' own words; give images or distillation")

    @contextmanager
    def objective(self, model: Model, task: Task) -> Iterator[tuple[Objective, Callable[[EditInfo], Edit]]]:
        subject, *others = self.subjects(task)
        if others:
            what = f"{1 + len(others)} subjects given, and each gets a module of its own here, which a region of an image is drawn with"
            raise UserError(f"{what}; fit them one at a time")
        pictures = Photos.of(model.arch, (subject,), self, TEMPLATES["object"], named)
        pictures.captions = [
            tuple(caption.replace(subject.token, own_word(row)) for caption in captions) for row, captions in enumerate(pictures.captions)
        ]
        concept = SingleConcept(model, subject, places_of(model, pictures, self.clip), self)
        with concept.words.unlisted(model), concept:
            yield Encoding(model, concept, self, subject, pictures), concept.edit

    @classmethod
    def example_task(cls, model: Model) -> CustomizeTask:
        """One picture that the package ships: the embedded world's sprites."""
        return CustomizeTask((Subject("<toy>", "picture", (ASSETS / "atlas.webp",)),))


class SingleConcept(Trainable):
    """The encoder of a subject's pictures, and the low-rank change of the keys and values.

    words: what makes a model know the subject's word and one for each picture, see `own_word`. seen: [pictures, places, k].
    """

    def __init__(self, model: Model, subject: Subject, seen: Tensor, method: MultiBooth) -> None:
        super().__init__()
        self.lora = LoraWeights(layers_of(model.arch, method.layers), method.rank, seed=method.seed)
        self.encoders = nn.ModuleDict(
            {part: QueryEncoder(model, part, subject.class_name, seen, method) for part in model.arch.token_embeddings()}
        )
        self.token, self.names = subject.token, [subject.token, *map(own_word, range(len(seen)))]
        rows = {part: encoder().detach() for part, encoder in self.encoders.items()}
        still = TokenEdit.from_rows({name: {part: of[i] for part, of in rows.items()} for i, name in enumerate(self.names)})
        self.words = LiveTokens(still.info, still.tokens, self.encoders)

    def enter(self) -> None:
        self.lora.enter()

    def leave(self) -> None:
        self.lora.leave()

    def square_norm(self, rows: Sequence[int]) -> Tensor:
        """|v|^2, mean over these pictures, of all text encoders together."""
        return torch.stack([encoder.unscaled()[list(rows)].square().sum(-1).mean() for encoder in self._each()]).sum()

    def _each(self) -> list[QueryEncoder]:
        return [encoder for encoder in self.encoders.values() if isinstance(encoder, QueryEncoder)]

    @torch.no_grad()
    def edit(self, info: EditInfo) -> Chain:
        """The subject's word, then the change."""
        part = replace(info, on=(), triggers=(), config={}, notes={})
        word = {name: encoder()[0] for name, encoder in self.encoders.items()}
        return Chain.of([TokenEdit.from_rows({self.token: word}, part), self.lora.edit(part)], info=info)


class QueryEncoder(nn.Module):
    """Embeddings for one text encoder, of what a CLIP sees in pictures [pictures, places, k] and of a class name.

    Called, it gives [1 + pictures, d]: the word of all pictures, then that of each.
    """

    seen: Tensor
    name: Tensor

    def __init__(self, model: Model, part: str, class_name: str, seen: Tensor, method: MultiBooth) -> None:
        super().__init__()
        table, tokenizer = model.arch.token_embeddings()[part], model.arch.tokenizers()[part]
        start = initial_rows(table, tokenizer, class_name, method.num_queries, seeded("queries", method.seed, part))
        ids = tokenizer(class_name, add_special_tokens=False).input_ids
        self.register_buffer("seen", seen, persistent=False)
        self.register_buffer("name", table.weight[ids].detach().float(), persistent=False)
        self.length = float(self.name.norm(dim=-1).mean())
        self.queries = nn.Parameter(start.clone())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeded("encoder", method.seed, part).initial_seed())
            self.layers = nn.ModuleList(QueryLayer(start.shape[1], seen.shape[2]) for _ in range(method.query_layers))
        self.layers.to(seen.device)

    def unscaled(self) -> Tensor:
        """v of each picture [pictures, d]."""
        count = len(self.seen)
        queries, name = (rows.expand(count, -1, -1) for rows in (self.queries, self.name))
        for layer in self.layers:
            queries, name = layer(queries, name, self.seen)
        return queries.mean(1)

    def forward(self) -> Tensor:
        each = self.unscaled()
        rows = torch.cat([each.mean(0, keepdim=True), each])
        return rows * (self.length / rows.norm(dim=-1, keepdim=True))


class QueryLayer(nn.Module):
    """Queries and a name [n, ., d] attend to each other, the queries then to places [n, places, k], and each goes through an MLP.

    What each part adds starts at zero.
    """

    def __init__(self, width: int, places: int) -> None:
        super().__init__()
        heads = gcd(width, max(1, width // 64))
        self.norms = nn.ModuleList(map(nn.LayerNorm, (width, width, places, width)))
        self.own = nn.MultiheadAttention(width, heads, batch_first=True)
        self.across = nn.MultiheadAttention(width, heads, batch_first=True, kdim=places, vdim=places)
        self.widened, self.narrowed = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        with torch.no_grad():
            for last in (self.own.out_proj, self.across.out_proj, self.narrowed):
                last.weight.zero_()
                last.bias.zero_()

    def forward(self, queries: Tensor, name: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        of_both, of_queries, of_places, of_all = self.norms
        count, both = queries.shape[1], torch.cat([queries, name], 1)
        calm = of_both(both)
        both = both + self.own(calm, calm, calm, need_weights=False)[0]
        queries, name = both[:, :count], both[:, count:]
        around = of_places(places)
        queries = queries + self.across(of_queries(queries), around, around, need_weights=False)[0]
        both = torch.cat([queries, name], 1)
        both = both + self.narrowed(F.gelu(self.widened(of_all(both))))
        return both[:, :count], both[:, count:]


class Encoding(PreservedDenoising):
    """The denoiser's error at each picture's own word, and how long this is before it is scaled."""

    module: SingleConcept

    def __init__(self, model: Model, module: SingleConcept, method: MultiBooth, subject: Subject, pictures: Photos) -> None:
        super().__init__(model, module, Prompts(model.arch, method.cache, grad=True), method, (subject,), pictures)
        self.norm_weight = method.norm_weight

    def loss_of(self, samples: Samples, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        value, shown = super().loss_of(samples, batch)
        square = self.module.square_norm(samples.rows)
        return value + self.norm_weight * square, {**shown, "norm": square.item() ** 0.5}


def own_word(row: int) -> str:
    """What the subject is called at a picture while it is learnt."""
    return f"<picture-{row}>"
