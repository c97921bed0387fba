"""Formats of other tools."""

from tl_vpd.formats.circuit_tracer import to_circuit_tracer

__all__ = ["to_circuit_tracer"]
