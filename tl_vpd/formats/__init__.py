"""Formats of other tools."""

from tl_vpd.formats.circuit_tracer import to_circuit_tracer
from tl_vpd.formats.param_decomp import load_param_decomp, save_param_decomp

__all__ = ["load_param_decomp", "save_param_decomp", "to_circuit_tracer"]
