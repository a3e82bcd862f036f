"""`IntFormat`: what config.json says of weights stored by GPTQ, AWQ or compressed-tensors."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minisgl.models.fields import Fields

METHODS = {"gptq": "qweight", "awq": "qweight", "compressed-tensors": "weight_packed"}
FORMATS = {"pack-quantized": "weight_packed", "int-quantized": "weight"}  # of compressed-tensors
# Of a group's section in compressed-tensors' config, and of its weights'.
_UNQUANTISED = {"input_activations": None, "output_activations": None}
_WEIGHTS = {"type": "int", "strategy": None, "group_size": None, "symmetric": True}
_WEIGHTS |= {"actorder": None, "dynamic": False, "block_structure": None}


@dataclass(frozen=True)
class IntFormat:
    """What a `quantization_config` says of how its weights are stored."""

    method: str
    codes: str  # the tensor of a matrix's codes
    bits: int
    groups: tuple[int, ...] = ()  # what sizes matrices have; -1: one group of all inputs
    zeros_less_one: bool = False
    needs_zeros: bool = False  # each matrix has zeros of its own


def read_int_format(config: Any, where: str) -> IntFormat:
    """Read config.json's `quantization_config`.

    Raises ValueError naming the field and its value for what is not read: other methods, other
    bits, an order of inputs by activation, activations that are quantised too.
    """
    where = f"{where}: quantization_config"
    if not isinstance(config, Mapping):
        raise ValueError(f"{where} must be an object, got {config!r}")
    method = Fields(config, where, {}).text("quant_method", METHODS)
    if method == "compressed-tensors":
        return _read_compressed(config, where)
    defaults = {"desc_act": False, "dynamic": None, "zero_point": True, "version": "gemm"}
    defaults |= {"is_marlin_format": False, "pack_dtype": "int32"}
    defaults |= {"checkpoint_format": None, "format": None}
    fields = Fields(config, where, defaults)
    _only(fields, "bits", 4, *([8] if method == "gptq" else []))
    group = fields.raw("group_size")
    if group != -1 and fields.integer("group_size") % 32:
        raise fields.bad("group_size", "a multiple of 32, or -1")
    if method == "awq":
        _only(fields, "zero_point", True)
        for name in ("version", "checkpoint_format", "format"):
            _only(fields, name, "gemm", "GEMM", *([None] if name != "version" else []))
        return IntFormat(method, METHODS[method], 4, (group,), needs_zeros=True)
    _only(fields, "desc_act", False)  # its groups are of inputs that lie apart
    _only(fields, "is_marlin_format", False)
    _only(fields, "pack_dtype", "int32")
    _only(fields, "dynamic", None, {})
    kinds = set()
    for name in ("checkpoint_format", "format"):  # GPTQModel has written either, and both
        _only(fields, name, None, "gptq", "gptq_v2")
        kinds.add(fields.raw(name))
    if len(kinds - {None}) > 1:
        raise fields.bad("format", f"as checkpoint_format, {fields.raw('checkpoint_format')!r}")
    bits, less_one = fields.integer("bits"), "gptq_v2" not in kinds
    return IntFormat(method, METHODS[method], bits, (group,), less_one, needs_zeros=True)


def _read_compressed(config: Mapping[str, Any], where: str) -> IntFormat:
    method = "compressed-tensors"
    defaults = {"quantization_status": "compressed", "kv_cache_scheme": None}
    defaults |= {"sparsity_config": None, "transform_config": None}
    fields = Fields(config, where, defaults)
    kind = fields.text("format", FORMATS)
    _only(fields, "quantization_status", "compressed", "frozen")
    _only(fields, "kv_cache_scheme", None)
    _only(fields, "sparsity_config", None, {})
    _only(fields, "transform_config", None, {})
    groups, bits, sizes, symmetric = fields.raw("config_groups"), set(), set(), set()
    if not isinstance(groups, Mapping) or not groups:
        raise fields.bad("config_groups", "an object of groups")
    for name, group in groups.items():
        inside = f"{where}: config_groups.{name}"
        if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
            raise fields.bad("config_groups", "an object of groups with weights")
        outer = Fields(group, inside, {"format": None, "weights": {}} | _UNQUANTISED)
        for what in _UNQUANTISED:
            _only(outer, what, None)
        _only(outer, "format", None, kind)
        weights = Fields(outer.raw("weights"), f"{inside}.weights", _WEIGHTS)
        _only(weights, "type", "int")
        _only(weights, "num_bits", *([4, 8] if kind == "pack-quantized" else [8]))
        _only(weights, "strategy", None, "group", "channel")
        _only(weights, "actorder", None, False, "weight", "static")
        _only(weights, "dynamic", None, False)
        _only(weights, "block_structure", None)
        bits.add(weights.integer("num_bits"))
        sizes.add(_group_size(weights))
        symmetric.add(weights.boolean("symmetric"))
    if len(bits) > 1:
        raise fields.bad("config_groups", "all of the same num_bits")
    zeros = symmetric == {False}
    return IntFormat(method, FORMATS[kind], bits.pop(), tuple(sorted(sizes)), needs_zeros=zeros)


def _group_size(weights: Fields) -> int:
    """Of compressed-tensors, where a strategy may be left out but not contradicted."""
    size, strategy = weights.raw("group_size"), weights.raw("strategy")
    if strategy == "group" or (strategy is None and size not in (None, -1)):
        return weights.integer("group_size")
    if size not in (None, -1):
        raise weights.bad("group_size", "None or -1, as strategy is 'channel'")
    return -1


def _only(fields: Fields, name: str, *allowed: Any) -> None:
    """Raises ValueError where a field has another value than one of these."""
    value = fields.raw(name)
    if not any(value == one and type(value) is type(one) for one in allowed):
        raise fields.bad(name, " or ".join(map(repr, allowed)))
