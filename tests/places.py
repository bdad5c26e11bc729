"""Two make-believe accelerators on one CPU: every tensor knows where it lies, and operations that mix places fail.

`Places` is a torch mode. Tensors lie in memory all the same, so numbers are those of a CPU; "cpu:1" and "cpu:2" stand
for the accelerators and "cpu" for the host. What CUDA allows is allowed: a scalar of the host beside tensors of an
accelerator, indices of the host into them, copies from place to place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import dispatch_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

HOST = torch.device("cpu")
ONE, TWO = torch.device("cpu", 1), torch.device("cpu", 2)

_COPIES = ("copy_", "grad")  # and what autograd carries from place to place
_INDEXING = ("__getitem__", "__setitem__", "index_put_", "index_put")


class Misplaced(RuntimeError):
    """Expected all tensors to be on the same device."""


def place_of(tensor: Tensor) -> torch.device:
    return getattr(tensor, "_place", HOST)


def put(tensor: Tensor, device: Any) -> None:
    tensor._place = HOST if device is None else torch.device(device)


class Places(TorchFunctionMode):
    """While it is on, tensors have places; counts the operations of each."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[torch.device, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None):
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if func == torch.Tensor.device.__get__:
            return torch.device("meta") if args[0].is_meta else place_of(args[0])
        if func == torch.Tensor.to:
            return self._to(*args, **kwargs)
        if name == "cpu":
            return self._to(args[0], HOST)
        if name == "__set__" and isinstance(args[1], Tensor):  # parameter.data = moved
            put(args[0], place_of(args[1]))
            return func(*args)
        device = kwargs.get("device")
        if device is not None:
            kwargs["device"] = torch.device(device).type
        tensors = list(_tensors((args, {key: one for key, one in kwargs.items() if key != "out"})))
        place = self._checked(name, args, tensors) if device is None else torch.device(device)
        result = func(*args, **kwargs)
        for number, one in enumerate(_tensors(result)):
            if not any(one is given for given in tensors):
                put(one, place_of(list(_tensors(args[1]))[number]) if name == "grad" else place)
        self.counts[place] = self.counts.get(place, 0) + 1
        return result

    def _to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        device = kwargs.pop("device", None)
        rest = []
        for one in args:
            if isinstance(one, Tensor):
                device, one = place_of(one), one.dtype
            elif isinstance(one, (str, torch.device)):
                device, one = torch.device(one), None
            rest += [] if one is None or isinstance(one, bool) else [one]  # flags that matter to real devices alone
        device = place_of(tensor) if device is None else torch.device(device)
        moved = tensor.to(*rest, **kwargs) if rest or kwargs else tensor
        if device.type == "meta":
            return moved.to("meta")
        fresh = isinstance(tensor, nn.Parameter) and not hasattr(tensor, "_place")  # made of one that has a place
        if moved is tensor and device != place_of(tensor) and not fresh:
            moved = tensor.view_as(tensor)  # another object, so that both have a place
        put(moved, device)
        return moved

    def _checked(self, name: str, args: tuple, tensors: list[Tensor]) -> torch.device:
        """The place of the outcome."""
        if not tensors:
            return HOST
        if name in _COPIES:
            return place_of(tensors[0])
        if name in _INDEXING:
            return self._indexed(name, tensors)
        wide = [one for one in tensors if one.dim() or place_of(one) != HOST]
        places = {place_of(one) for one in wide}
        if len(places) > 1:
            told = ", ".join(f"{tuple(one.shape)} on {place_of(one)}" for one in tensors)
            raise Misplaced(f"{name}: {told}")
        return places.pop() if places else HOST

    def _indexed(self, name: str, tensors: list[Tensor]) -> torch.device:
        own = place_of(tensors[0])
        for one in tensors[1:]:
            if place_of(one) not in (own, HOST):
                raise Misplaced(f"{name}: {own} by {place_of(one)}")
        return own


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _tensors(one)


def split_in_two(model: nn.Module, device_map: Mapping[str, torch.device]) -> nn.Module:
    """Dispatch ``model`` by accelerate, as ``device_map="auto"`` does over two accelerators."""
    first = next(iter(device_map.values()))
    with Places():
        dispatch_model(model, dict(device_map), main_device=first)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        part = max((one for one in device_map if name.startswith(f"{one}.")), key=len)
        put(tensor, device_map[part])
    return model
