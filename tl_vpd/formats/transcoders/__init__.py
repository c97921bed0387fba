"""Transcoders and SAEs of SAELens, of circuit-tracer, and those that the authors compared with, as ``Transcoders``."""

from tl_vpd.formats.transcoders.circuit_tracer import load_circuit_tracer_transcoders, save_circuit_tracer_transcoders
from tl_vpd.formats.transcoders.paper import load_paper_transcoders
from tl_vpd.formats.transcoders.saelens import load_saelens, save_saelens

__all__ = [
    "load_circuit_tracer_transcoders",
    "load_paper_transcoders",
    "load_saelens",
    "save_circuit_tracer_transcoders",
    "save_saelens",
]
