"""`IntFormat`: what config.json says of weights stored by GPTQ, AWQ or compressed-tensors."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minisgl.models.fields import Fields

METHODS = {"gptq": "qweight", "awq": "qweight", "compressed-tensors": "weight_packed"}
FORMATS = {"pack-quantized": "weight_packed", "int-quantized": "weight"}  # of compressed-tensors
# Of a group's section in compressed-tensors' config, and of its weights'.
_UNQUANTISED = {"input_activations": None, "output_activations": None}
_WEIGHTS = {"type": "int", "strategy": None, "actorder": None}


@dataclass(frozen=True)
class IntFormat:
    """What a `quantization_config` says of how its weights are stored."""

    method: str
    codes: str  # the tensor of a matrix's codes
    bits: int
    group: int | None = None  # that all matrices have: -1 for one of all inputs
    zeros_less_one: bool = False


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
    defaults = {"desc_act": False, "checkpoint_format": "gptq", "dynamic": None, "zero_point": True}
    defaults |= {"is_marlin_format": False, "pack_dtype": "int32", "version": "gemm"}
    fields = Fields(config, where, defaults)
    _only(fields, "bits", 4, *([8] if method == "gptq" else []))
    group = fields.raw("group_size")
    if group != -1 and fields.integer("group_size") % 32:
        raise fields.bad("group_size", "a multiple of 32, or -1")
    if method == "awq":
        _only(fields, "zero_point", True)
        _only(fields, "version", "gemm", "GEMM")
        return IntFormat(method, METHODS[method], 4, group)
    _only(fields, "desc_act", False)  # its groups are of inputs that lie apart
    _only(fields, "is_marlin_format", False)
    _only(fields, "pack_dtype", "int32")
    _only(fields, "dynamic", None, {})
    _only(fields, "checkpoint_format", "gptq", "gptq_v2")
    less_one = fields.raw("checkpoint_format") == "gptq"
    return IntFormat(method, METHODS[method], fields.integer("bits"), group, less_one)


def _read_compressed(config: Mapping[str, Any], where: str) -> IntFormat:
    defaults = {"quantization_status": "compressed", "kv_cache_scheme": None}
    defaults |= {"sparsity_config": None, "transform_config": None}
    fields = Fields(config, where, defaults)
    kind = fields.text("format", FORMATS)
    _only(fields, "quantization_status", "compressed", "frozen")
    _only(fields, "kv_cache_scheme", None)
    _only(fields, "sparsity_config", None, {})
    _only(fields, "transform_config", None, {})
    groups, bits = fields.raw("config_groups"), set()
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
        bits.add(weights.integer("num_bits"))
    if len(bits) > 1:
        raise fields.bad("config_groups", "all of the same num_bits")
    return IntFormat("compressed-tensors", FORMATS[kind], bits.pop())


def _only(fields: Fields, name: str, *allowed: Any) -> None:
    """Raises ValueError where a field has another value than one of these."""
    value = fields.raw(name)
    if not any(value == one and type(value) is type(one) for one in allowed):
        raise fields.bad(name, " or ".join(map(repr, allowed)))
