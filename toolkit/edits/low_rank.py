"""Low-rank changes of linear layers and convolutions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor

from toolkit.edits.base import Edit, EditInfo, frozen, read_by
from toolkit.errors import UserError, unknown

WEIGHT_NDIMS = (2, 4)  # of a linear layer and of a convolution


@dataclass(frozen=True, eq=False)
class LowRank(Edit):
    """W -> W + scale * up @ down for each linear layer, or W + scale * dense where that is the smaller form.

    up: site -> [out, r]. down: site -> [r, in]. dense: site -> [out, in]. A site is in `dense` or in both others. Sites
    may share one `down` tensor object; the file then holds it once (a closed-form edit W0 + W0 U V shares V among all
    layers that read the same text, so that only W0 U is stored for each).

    For a convolution `in` stands for three axes, [in, rows, columns]: `down` convolves, `up` mixes its r channels.

    File: `down.<i>` are the distinct down factors, `up.<i>.<site>` the up factor of a site that uses the i-th,
    `dense.<site>` the rest.

    Make one with `from_factors` or `from_deltas`, which choose the smaller form.
    """

    up: Mapping[str, Tensor]
    down: Mapping[str, Tensor]
    dense: Mapping[str, Tensor] = field(default_factory=dict)

    mergeable: ClassVar[bool] = True
    scalable: ClassVar[bool] = True
    exports: ClassVar[tuple[str, ...]] = ("diffusers-lora", "kohya-lora", "delta", "checkpoint")

    def __post_init__(self) -> None:
        if self.up.keys() != self.down.keys():
            raise UserError(f"sites {sorted(self.up.keys() ^ self.down.keys())} have one factor of two; give both up and down")
        for site, up in self.up.items():
            down = self.down[site]
            if up.ndim != 2 or down.ndim not in WEIGHT_NDIMS or up.shape[1] != down.shape[0]:
                given = f"up {tuple(up.shape)} and down {tuple(down.shape)}"
                raise UserError(f"factors of {site} are {given}, need [out, r] and [r, in]; check their ranks and order")
        for site, dense in self.dense.items():
            if dense.ndim not in WEIGHT_NDIMS or site in self.up:
                raise UserError(f"dense change of {site} is {tuple(dense.shape)}, need one [out, in] and no factors beside it")

    # --- making one ---------------------------------------------------------------------------------------------
    @classmethod
    def from_factors(cls, factors: Mapping[str, tuple[Tensor, Tensor]], info: EditInfo | None = None) -> Self:
        """From site -> (up [out, r], down [r, in]). Kept in float32, on the CPU.

        Sites that are given the same `down` object share it. Such a group becomes dense when its dense form is smaller.
        """
        groups: dict[int, list[str]] = {}
        for site, (_, down) in factors.items():
            groups.setdefault(id(down), []).append(site)
        ups: dict[str, Tensor] = {}
        downs: dict[str, Tensor] = {}
        dense: dict[str, Tensor] = {}
        for sites in groups.values():
            down = factors[sites[0]][1]
            out = sum(len(factors[site][0]) for site in sites)
            rank, columns = len(down), down[0].numel()
            if out * columns <= (out + columns) * rank:
                dense |= {site: frozen(torch.tensordot(factors[site][0].to(down), down, dims=1)) for site in sites}
            else:
                ups |= {site: frozen(factors[site][0]) for site in sites}
                downs |= dict.fromkeys(sites, frozen(down))
        return cls(info or EditInfo(), ups, downs, dense)

    @classmethod
    def from_deltas(
        cls, deltas: Mapping[str, Tensor], info: EditInfo | None = None, *, rank: int | None = None, tolerance: float = 1e-6
    ) -> Self:
        """From site -> dense change [out, in], by a truncated SVD in float64.

        rank: keep this many directions; None keeps all singular values above `tolerance` times the largest.
        A layer whose factors would not be smaller is stored dense, exactly when `rank` is None.
        """
        factors: dict[str, tuple[Tensor, Tensor]] = {}
        dense: dict[str, Tensor] = {}
        for site, delta in deltas.items():
            up, down = svd_factors(delta, rank=rank, tolerance=tolerance)
            if rank is None and delta.numel() <= up.numel() + down.numel():
                dense[site] = frozen(delta)
            else:
                factors[site] = up, down
        low_rank = cls.from_factors(factors, info)
        return cls(low_rank.info, low_rank.up, low_rank.down, {**low_rank.dense, **dense})

    @classmethod
    def merge(cls, edits: Sequence[LowRank], scales: Sequence[float] | None = None, info: EditInfo | None = None) -> Self:
        """One edit that is the sum of several (each times its scale): factors are concatenated, so it is exact."""
        scales = scales or [1.0] * len(edits)
        sites = list(dict.fromkeys(site for edit in edits for site in (*edit.up, *edit.dense)))
        shared: dict[tuple[int, ...], Tensor] = {}
        factors: dict[str, tuple[Tensor, Tensor]] = {}
        dense: dict[str, Tensor] = {}
        for site in sites:
            uses = [(edit, scale) for edit, scale in zip(edits, scales, strict=True) if site in edit.up or site in edit.dense]
            if any(site in edit.dense for edit, _ in uses):
                dense[site] = torch.stack([scale * edit.delta(site) for edit, scale in uses]).sum(0)
                continue
            downs = [edit.down[site] for edit, _ in uses]
            down = shared.setdefault(tuple(map(id, downs)), torch.cat(downs))
            factors[site] = (torch.cat([scale * edit.up[site] for edit, scale in uses], 1), down)
        low_rank = cls.from_factors(factors, info)
        return cls(low_rank.info, low_rank.up, low_rank.down, {**low_rank.dense, **dense})

    # --- the file -----------------------------------------------------------------------------------------------
    def tensors(self) -> dict[str, Tensor]:
        number = {key: i for i, key in enumerate(dict.fromkeys(map(id, self.down.values())))}
        downs = {f"down.{number[id(down)]}": down for down in self.down.values()}
        ups = {f"up.{number[id(self.down[site])]}.{site}": up for site, up in self.up.items()}
        return {**downs, **ups, **{f"dense.{site}": delta for site, delta in self.dense.items()}}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], info: EditInfo) -> Self:
        up: dict[str, Tensor] = {}
        down: dict[str, Tensor] = {}
        dense: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            match key.split(".", 2):
                case ["up", number, site]:
                    if f"down.{number}" not in tensors:
                        raise UserError(f"low-rank edit lacks tensor down.{number}, which {site} needs; fit or download it again")
                    up[site], down[site] = tensor, tensors[f"down.{number}"]
                case ["dense", *rest]:
                    dense[".".join(rest)] = tensor
                case ["down", number] if any(other.startswith(f"up.{number}.") for other in tensors):
                    pass
                case _:
                    raise UserError(f"low-rank edit has a tensor {key!r} that belongs to no layer; fit or download it again")
        return cls(info, up, down, dense)

    # --- reading and applying -----------------------------------------------------------------------------------
    def sites(self) -> list[str]:
        return self.parameter_names()

    def parameter_names(self) -> list[str]:
        return [f"{site}.weight" for site in (*self.up, *self.dense)]

    def shape(self, name: str) -> tuple[int, ...]:
        site = self._site(name)
        return tuple(self.dense[site].shape) if site in self.dense else (len(self.up[site]), *self.down[site].shape[1:])

    def delta(self, site: str) -> Tensor:
        """[out, in] of a parameter name or a site."""
        return self._delta(site, torch.device("cpu"))

    def factors(self, site: str) -> tuple[Tensor, Tensor]:
        """(up [out, r], down [r, in]) of a parameter name or a site, float32; a dense change is factored exactly."""
        site = self._site(site)
        if site in self.up:
            return self.up[site].float(), self.down[site].float()
        return svd_factors(self.dense[site])

    def weight(self, name: str, current: Tensor, scale: float) -> Tensor:
        return torch.add(current, self._delta(name, current.device), alpha=scale)

    def _delta(self, name: str, device: torch.device) -> Tensor:
        """The dense change, multiplied out on `device`."""
        site = self._site(name)
        if site in self.dense:
            return self.dense[site].to(device).float()
        return torch.tensordot(self.up[site].to(device).float(), self.down[site].to(device).float(), dims=1)

    def _site(self, name: str) -> str:
        site = name.removesuffix(".weight")
        if site not in self.up and site not in self.dense:
            raise unknown("site", name, self.sites())
        return site

    @property
    def writes(self) -> frozenset[str]:
        return frozenset(site.partition(".")[0] for site in (*self.up, *self.dense))

    @property
    def reads(self) -> frozenset[str]:
        return read_by(self.writes)


def svd_factors(delta: Tensor, *, rank: int | None = None, tolerance: float = 1e-6) -> tuple[Tensor, Tensor]:
    """(up [out, r], down [r, in]), float32, of the truncated SVD in float64 of a change [out, in].

    rank: at most this many directions; None keeps the singular values above `tolerance` times the largest.
    """
    u, s, vt = torch.linalg.svd(delta.detach().double().flatten(1), full_matrices=False)
    r = max(1, int((s > tolerance * s[0]).sum())) if rank is None else min(rank, len(s))
    root = s[:r].sqrt()  # shared by both factors, so that neither is far outside what half precision holds
    return (u[:, :r] * root).float(), (root[:, None] * vt[:r]).float().view(r, *delta.shape[1:])
