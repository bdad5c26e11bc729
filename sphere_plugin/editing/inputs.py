"""What enters linear layers at chosen tokens: keys of any text, for any weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn

from sphere_plugin.errors import ModelError
from sphere_plugin.models.forward import Enough, pad_right, trunk
from sphere_plugin.models.memory import work_through
from sphere_plugin.models.placement import input_device

# Token ids of a text, and the positions in it that are asked for.
Row = tuple[Sequence[int], Sequence[int]]


@torch.no_grad()
def read_inputs(
    model: nn.Module, modules: Mapping[str, nn.Module], rows: Sequence[Row], token_budget: int = 8192
) -> dict[str, Tensor]:
    """Read what enters ``modules`` at chosen tokens, with the weights as they are.

    Args:
        model: a decoder-only language model, in eval mode.
        modules: name -> one of its linear layers.
        rows: token ids and positions; each text is read from its beginning.
        token_budget: tokens in one pass.

    Returns:
        Name -> [positions in all, d_in] float32 on the CPU, in the order of the rows and of their positions.

    Raises:
        ModelError: a layer is not passed by every token, as experts of a mixture are not.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in modules}
    for _, part in work_through(
        rows, lambda row: len(row[0]), token_budget, lambda piece: _read(model, modules, piece)
    ):
        for name, keys in part.items():
            found[name].append(keys)
    return {name: torch.cat(parts) for name, parts in found.items()}


def _read(model: nn.Module, modules: Mapping[str, nn.Module], rows: Sequence[Row]) -> dict[str, Tensor]:
    ids, mask = pad_right([tokens for tokens, _ in rows])
    numbers = torch.tensor([number for number, (_, picks) in enumerate(rows) for _ in picks], dtype=torch.long)
    places = torch.tensor([place for _, picks in rows for place in picks], dtype=torch.long)
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
            entered = args[0]
            if entered.shape[:2] != ids.shape:
                expected = f"one input for each of {tuple(ids.shape)} tokens"
                raise ModelError(f"inputs of {name}", tuple(entered.shape), expected, "Its keys cannot be read here.")
            seen[name] = entered[numbers.to(entered.device), places.to(entered.device)].float().cpu()
            if len(seen) == len(modules):
                raise Enough

        return keep

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_pre_hook(hook(name)).remove)
        stack.enter_context(suppress(Enough))
        device = input_device(model)
        trunk(model)(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
    missing = [name for name in modules if name not in seen]
    if missing:
        raise ModelError(f"inputs of {missing[0]}", "none", "a layer that every token passes", "Leave this run out.")
    return seen
