"""How a training step's passes are carried out: operation by operation, or as compiled graphs."""

from tl_vpd.training.engine.compiled import CompiledEngine
from tl_vpd.training.engine.eager import CleanForward, EagerEngine, LossTerm, MaskInputs, Precision

__all__ = ["CleanForward", "CompiledEngine", "EagerEngine", "LossTerm", "MaskInputs", "Precision"]
