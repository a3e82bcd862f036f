"""Embedding on CPU: rows of a dense weight, or of one in panels, gathered natively."""

import torch

from minisgl import csrc
from minisgl.device.tape import by_call, empty
from minisgl.kernels.embedding import embedding_reference
from minisgl.kernels.grouped_linear.panels import GroupedPanels
from minisgl.kernels.linear.panels import Panels
from minisgl.kernels.matrix import Matrix
from minisgl.kernels.native import NATIVE_DTYPES

embedding_twin = by_call(embedding_reference)


def embedding_cpu(
    ids: torch.Tensor,
    weight: Matrix,
    part: tuple[int, int] | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """See `embedding_reference`. Raises IndexError for an id without a row."""
    native = csrc.load("model_ops")
    values = weight.values if isinstance(weight, Panels) else weight
    dense = isinstance(values, torch.Tensor) and values.is_contiguous()
    if (
        native is None
        or values.dtype not in NATIVE_DTYPES
        or not (dense or isinstance(weight, GroupedPanels))
    ):
        return embedding_twin(ids, weight, part, scale)
    ids, (n, k) = ids.int().contiguous(), weight.shape
    tokens, own, (first, count) = len(ids), ids, part or (0, n)
    is_bf16 = values.dtype == torch.bfloat16
    if part is not None:
        own = empty((tokens,), torch.int32)
        native.local_ids(ids.data_ptr(), own.data_ptr(), tokens, first, count)
    rows = empty((tokens, k), values.dtype)
    if isinstance(weight, GroupedPanels):
        at = own.data_ptr(), *weight.addresses, rows.data_ptr(), tokens
        native.embed_grouped(*at, *weight.layout, is_bf16)
    elif isinstance(weight, Panels):
        at = own.data_ptr(), weight.values.data_ptr(), rows.data_ptr(), tokens
        native.embed_panels(*at, n, k)
    else:
        at = own.data_ptr(), weight.data_ptr(), rows.data_ptr(), tokens
        native.embed_dense(*at, n, k * weight.element_size())
    if part is not None or scale is not None:
        facts = tokens, k, first, count, 1.0 if scale is None else scale, is_bf16
        native.finish_rows(ids.data_ptr(), rows.data_ptr(), *facts, torch.get_num_threads())
    return rows
