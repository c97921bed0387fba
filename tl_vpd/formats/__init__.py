"""Formats of other tools."""

from tl_vpd.formats.circuit_tracer import to_circuit_tracer
from tl_vpd.formats.circuits import load_circuit
from tl_vpd.formats.neuronpedia import NeuronpediaConfig, save_neuronpedia
from tl_vpd.formats.param_decomp import load_param_decomp, save_param_decomp
from tl_vpd.formats.transcoders import (
    load_circuit_tracer_transcoders,
    load_paper_transcoders,
    load_saelens,
    save_circuit_tracer_transcoders,
    save_saelens,
)

__all__ = [
    "NeuronpediaConfig",
    "load_circuit",
    "load_circuit_tracer_transcoders",
    "load_paper_transcoders",
    "load_param_decomp",
    "load_saelens",
    "save_circuit_tracer_transcoders",
    "save_neuronpedia",
    "save_param_decomp",
    "save_saelens",
    "to_circuit_tracer",
]
