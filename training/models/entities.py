"""Attention over a set of entities of one size, so that decisions do not depend on how many a task has.

A sight is ``own`` numbers about oneself, and then ``entity`` numbers about each thing that is seen. Oneself asks, by
attention with several heads (Vaswani et al., arXiv 1706.03762), what is seen, which is pooling by attention as the Set
Transformer has it (Lee et al., arXiv 1810.00825) with oneself as the seed: the order of entities is of no consequence,
unless ``has_places`` says that different places hold different things.

Of every size of sight that its roles have, it has a front-end, ``encode/<size>/*``: perception. What decides,
``decide/*``, and what values, ``value/*``, are the same for all. So a policy may share these between tasks, and keep
its perception to itself (``shared=("decide/*", "value/*")``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from shoal.protocol.errors import UsageError
from shoal.training.models.bodies import BodyModel, Turns, whole
from shoal.training.models.flat import Spec
from shoal.training.tasks.play import Role


class Entities(BodyModel):
    """The model called ``entities``."""

    takes_many = True

    def __init__(
        self,
        roles: Sequence[Role],
        *,
        own: int,
        entity: int,
        width: int = 32,
        heads: int = 2,
        has_places: bool = False,
        hidden_sizes: Sequence[int] = (64,),
        central: int = 0,
        initial_log_std: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Initialise it; see `BodyModel`.

        Args:
            roles: whose sights and acts it is for.
            own: how many numbers of a sight, the first, are about oneself.
            entity: how many are about each thing.
            width: of what attention sees.
            heads: of it.
            has_places: whether the first thing is another kind of thing than the second.
            hidden_sizes: of the network that decides, and of the one that values.
            central: numbers that values see beside.
            initial_log_std: of a continuous policy.
            seed: of the initial values.

        Raises:
            UsageError: if a sight is not divided so.
        """
        super().__init__(roles, central)
        self._own, self._entity = whole("own", own, 1, 4096), whole("entity", entity, 1, 4096)
        self._width, self._heads = whole("width", width, 1, 4096), whole("heads", heads, 1, 64)
        if width % heads:
            raise UsageError(f"a width of {width} is not divided among {heads} heads; choose a multiple of them")
        seen: dict[str, Spec] = {}
        for size in self.sizes:
            if size < own or (size - own) % entity:
                raise UsageError(f"a sight of {size} is not {own} numbers about oneself and {entity} about each thing")
            count = (size - own) // entity
            seen |= {
                f"encode/{size}/own": Spec((width, own), own**-0.5),
                f"encode/{size}/own_bias": Spec((width,)),
                f"encode/{size}/out": Spec((width, 2 * width), (2 * width) ** -0.5),
                f"encode/{size}/out_bias": Spec((width,)),
            }
            if count:
                seen |= {
                    f"encode/{size}/entity": Spec((width, entity), entity**-0.5),
                    f"encode/{size}/entity_bias": Spec((count if has_places else 1, width), 0.5 * has_places),
                    f"encode/{size}/query": Spec((width, width), width**-0.5),
                    f"encode/{size}/key": Spec((width, width), width**-0.5),
                    f"encode/{size}/value": Spec((width, width), width**-0.5),
                }
        self._begin(seen, width, hidden_sizes, initial_log_std, seed)

    def see(self, turns: Turns) -> torch.Tensor:
        """``[S, T, width]``, by the front-end of each row's size."""
        kinds = sorted(set(turns.kinds.tolist()))
        if len(kinds) == 1:
            return self._encode(self.sizes[kinds[0]], turns.sights)
        found = torch.zeros((*turns.sights.shape[:2], self._width))
        for kind in kinds:
            rows = (turns.kinds == kind).nonzero()[:, 0]
            found = found.index_put((rows,), self._encode(self.sizes[kind], turns.sights[rows]))
        return found

    def _encode(self, size: int, sights: torch.Tensor) -> torch.Tensor:
        own = {
            name.removeprefix(f"encode/{size}/"): tensor
            for name, tensor in self._parameters.tensors.items()
            if name.startswith(f"encode/{size}/")
        }
        rows = sights[..., :size].reshape(-1, size)
        self_seen = torch.tanh(functional.linear(rows[:, : self._own], own["own"], own["own_bias"]))
        pooled = torch.zeros_like(self_seen)
        if "entity" in own:
            things = rows[:, self._own :].reshape(len(rows), -1, self._entity)
            things = torch.tanh(functional.linear(things, own["entity"]) + own["entity_bias"])
            asked = functional.linear(self_seen, own["query"])[:, None]
            query, key, value = (
                each.view(len(rows), -1, self._heads, self._width // self._heads).transpose(1, 2)
                for each in (asked, functional.linear(things, own["key"]), functional.linear(things, own["value"]))
            )
            pooled = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(1)
        both = torch.cat([self_seen, pooled], dim=-1)
        encoded = torch.tanh(functional.linear(both, own["out"], own["out_bias"]))
        return encoded.view(*sights.shape[:2], self._width)
