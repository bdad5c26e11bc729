"""The one place that knows how a layer stores its weight.

The mathematics wants a matrix [d_out, d_in] with one neuron per row. torch's ``nn.Linear`` stores exactly that; the
``Conv1D`` of transformers (GPT-2 and its kin) stores the transpose. A model's name says nothing about it, the type of
its layers does.
"""

from __future__ import annotations

from torch import Tensor, nn

from sphere_plugin.errors import ModelError


def neurons(weight: Tensor, transposed: bool) -> Tensor:
    """Returns a stored weight in mathematical orientation: [d_out, d_in], rows are neurons.

    Args:
        weight: as stored, [d_out, d_in], or [d_in, d_out] if ``transposed``.
        transposed: what `is_transposed` says of the module that owns it.

    Returns:
        A view: it shares the weight's memory, and writing to it writes to the weight.

    Raises:
        ModelError: the weight is not a matrix.
    """
    return _turned(weight, transposed, "weight")


def stored(matrix: Tensor, transposed: bool) -> Tensor:
    """Returns a matrix [d_out, d_in] as its module stores it; the inverse of `neurons`, and a view as well.

    Args:
        matrix: [d_out, d_in], a weight or an update.
        transposed: what `is_transposed` says of the module it goes to.

    Raises:
        ModelError: it is not a matrix.
    """
    return _turned(matrix, transposed, "matrix")


def is_transposed(module: nn.Module) -> bool:
    """Tells whether a layer stores its weight as [d_in, d_out].

    Decided from the module's type: False for ``nn.Linear`` and its subclasses, True for transformers' ``Conv1D``,
    which is recognised without importing transformers.

    Raises:
        ModelError: the module has no weight matrix, or its type is neither of the two and nothing here guesses.
    """
    kind = type(module)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        shape = tuple(weight.shape) if isinstance(weight, Tensor) else None
        remedy = "Name a linear layer; SPHERE edits one weight matrix at a time."
        raise ModelError(f"the weight of {kind.__name__}", shape, "a matrix, two dimensions", remedy)
    if isinstance(module, nn.Linear):
        return False
    if any(base.__name__ == "Conv1D" for base in kind.__mro__) and hasattr(module, "nf"):
        return True
    raise ModelError(
        "the layer's type",
        f"{kind.__module__}.{kind.__qualname__}",
        "nn.Linear or transformers' Conv1D",
        "Name the linear layer inside it, or say the orientation yourself with neurons(weight, transposed=...).",
    )


def _turned(matrix: Tensor, transposed: bool, name: str) -> Tensor:
    if matrix.dim() != 2:
        remedy = "Pass one layer's weight matrix; of stacked experts, pass one expert at a time."
        raise ModelError(f"{name}'s shape", tuple(matrix.shape), "two dimensions", remedy)
    return matrix.T if transposed else matrix
