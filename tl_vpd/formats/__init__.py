"""Formats of other tools."""

from tl_vpd.formats.circuit_tracer import to_circuit_tracer
from tl_vpd.formats.circuits import load_circuit
from tl_vpd.formats.neuronpedia import NeuronpediaConfig, save_neuronpedia
from tl_vpd.formats.param_decomp import load_param_decomp, save_param_decomp

__all__ = [
    "NeuronpediaConfig",
    "load_circuit",
    "load_param_decomp",
    "save_neuronpedia",
    "save_param_decomp",
    "to_circuit_tracer",
]
