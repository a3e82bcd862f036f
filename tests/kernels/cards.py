"""What the card tests share: the fp64 oracle, poisoned memory, the tolerance."""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch

from minisgl.kernels.op import Op

Values = dict[str, Any]


def copied(value: Any, floating: torch.dtype | None = None) -> Any:
    """A deep copy of arguments, floating tensors cast when a dtype is given; layouts are kept."""
    if isinstance(value, torch.Tensor):
        copy = torch.empty_strided(
            value.shape, value.stride(), dtype=value.dtype, device=value.device
        )
        copy.copy_(value)
        return copy.to(floating) if floating and value.is_floating_point() else copy
    if isinstance(value, dict):
        return {name: copied(item, floating) for name, item in value.items()}
    if isinstance(value, tuple | list):
        items = [copied(item, floating) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


@contextmanager
def poisoned() -> Iterator[None]:
    """Within the context, fresh memory is NaN, or -7 for integers: what nobody writes shows."""

    def poison(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def made(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = make(*args, **kwargs)
            fill = torch.nan if tensor.is_floating_point() else -7
            return tensor.fill_(fill) if tensor.dtype != torch.bool else tensor

        return made

    with ExitStack() as stack:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            stack.enter_context(patch.object(owner, name, poison(getattr(owner, name))))
        yield


def tensors(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors inside a result or an argument, each with a name for messages."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from tensors(f"{name}.{key}", item)
    elif hasattr(value, "_fields"):
        yield from tensors(name, value._asdict())
    elif isinstance(value, tuple | list):
        for index, item in enumerate(value):
            yield from tensors(f"{name}[{index}]", item)
    elif hasattr(value, "__dataclass_fields__"):
        for key in value.__dataclass_fields__:
            yield from tensors(f"{name}.{key}", getattr(value, key))


def outcome(function: Callable[..., Any], arguments: Values) -> dict[str, torch.Tensor]:
    """All that a call leaves behind: what it returns and its arguments afterwards."""
    result = function(**arguments)
    return dict([*tensors("result", result), *tensors("argument", arguments)])


def truth(op: Op, arguments: Values) -> dict[str, torch.Tensor]:
    """The reference in float64 throughout, its own widening to float32 included."""
    with patch.object(torch.Tensor, "float", torch.Tensor.double):
        return outcome(op.reference, copied(arguments, torch.float64))


def check(op: Op, name: str, arguments: Values) -> None:
    """Asserts that an implementation is as good as plain PyTorch in the same dtype.

    What it does not serve it must refuse. Its error against float64, largest and root mean
    square, may be twice the reference's; where the reference is exact, so must it be. Integers
    are equal.
    """
    refusal = next(i for i in op.implementations if i.name == name).refusal(**arguments)
    if refusal is not None:
        with pytest.raises(ValueError, match=f"^{re.escape(refusal)}$"):
            op.implementation(name)(**arguments)
        return
    exact = truth(op, arguments)
    plain = outcome(op.reference, copied(arguments))
    with poisoned():
        got = outcome(op.implementation(name), copied(arguments))
    assert got.keys() == plain.keys(), (got.keys(), plain.keys())
    for key, want in plain.items():
        found = got[key]
        assert found.dtype == want.dtype, f"{key}: {found.dtype}, want {want.dtype}"
        assert found.shape == want.shape, f"{key}: {found.shape}, want {want.shape}"
        if not found.is_floating_point():
            assert torch.equal(found, want), f"{key} differs"
        else:
            check_floats(key, found, want, exact[key])


def check_floats(key: str, found: torch.Tensor, want: torch.Tensor, exact: torch.Tensor) -> None:
    special = ~exact.isfinite()
    same = (found == want) | (found.isnan() & want.isnan())
    assert bool(same[special].all()), f"{key}: NaN or infinities differ"
    if bool(special.all()):
        return
    ours = (found.double() - exact)[~special]
    theirs = (want.double() - exact)[~special]
    assert bool(ours.isfinite().all()), f"{key}: not finite where it should be"
    if not bool(theirs.any()):
        assert not bool(ours.any()), f"{key}: differs where plain PyTorch is exact"
        return
    scale = exact[~special].abs()
    slack = 8 * torch.finfo(torch.float32).eps  # of float32 arithmetic in another order
    for measure, of in (("largest", lambda x: x.abs().max()), ("mean square", lambda x: x.norm())):
        limit = 2 * of(theirs) + slack * of(scale)
        assert of(ours) <= limit, f"{key}: {measure} error {of(ours):.3e}, limit {limit:.3e}"
