"""RMSNorm in one pass: a program holds whole rows, so each element is read once.

Rows as long as a hidden state take a program each; rows as short as a head share one, so that a
warp's loads stay 128 bits wide.
"""

import torch
import triton
import triton.language as tl

from minisgl.kernels.config import row_warps


@triton.jit(do_not_specialize=["rows"])
def rmsnorm_kernel(
    x_ptr,  # [rows / INNER, INNER, N], by strides
    residual_ptr,
    weight_ptr,  # [N]
    y_ptr,  # [rows, N]
    sum_ptr,  # [rows, N]
    eps,
    rows,
    x_outer,
    x_inner,
    residual_outer,
    residual_inner,
    INNER: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    RESIDUAL: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    n = tl.arange(0, BLOCK)[None, :]
    ok = (row < rows) & (n < N)
    outer = row // INNER
    inner = row % INNER
    x = tl.load(x_ptr + outer * x_outer + inner * x_inner + n, mask=ok, other=0.0).to(tl.float32)
    if RESIDUAL:
        source = residual_ptr + outer * residual_outer + inner * residual_inner + n
        x += tl.load(source, mask=ok, other=0.0).to(tl.float32)
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * N + n, rounded, mask=ok)
        x = rounded.to(tl.float32)  # what the next layer reads back is what is normalised
    weight = tl.load(weight_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    if UNIT_OFFSET:
        weight += 1.0
    scale = tl.rsqrt(tl.sum(x * x, 1) / N + eps)
    y = x * scale[:, None] * weight
    tl.store(y_ptr + row * N + n, y.to(y_ptr.dtype.element_ty), mask=ok)


def _as_rows(x: torch.Tensor) -> tuple[int, int, int]:
    """(outer stride, inner stride, inner size) of x's rows along its last dimension."""
    if x.stride(-1) != 1 and x.shape[-1] != 1:
        raise ValueError(f"the last dimension must be dense, got strides {x.stride()}")
    if x.dim() == 1:
        return 0, 0, 1
    if x.dim() == 2:
        return x.stride(0), 0, 1
    if x.dim() == 3:
        return x.stride(0), x.stride(1), x.shape[1]
    raise ValueError(f"x must have at most 3 dimensions, got {x.dim()}")


def rmsnorm_portable(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    unit_offset: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`rmsnorm_reference` on a GPU. Raises ValueError for shapes that do not fit."""
    size = x.shape[-1]
    if weight.shape != (size,):
        raise ValueError(f"weight must be [{size}], got {list(weight.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must be {list(x.shape)}, got {list(residual.shape)}")
    outer, inner, inner_size = _as_rows(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = y if residual is None else torch.empty_like(y)
    rows = x.numel() // size if size else 0
    if rows:
        added = x if residual is None else residual
        residual_outer, residual_inner, _ = _as_rows(added)
        block = triton.next_power_of_2(size)
        tile = max(1, 1024 // block)
        rmsnorm_kernel[(triton.cdiv(rows, tile),)](
            x,
            added,
            weight,
            y,
            total,
            eps,
            rows,
            outer,
            inner,
            residual_outer,
            residual_inner,
            INNER=inner_size,
            N=size,
            ROWS=tile,
            BLOCK=block,
            RESIDUAL=residual is not None,
            UNIT_OFFSET=unit_offset,
            num_warps=row_warps(tile * block),
        )
    return y if residual is None else (y, total)
