"""How a training step's passes are carried out: operation by operation, or as compiled graphs."""

from tl_vpd.training.engine.choose import engine_of
from tl_vpd.training.engine.compiled import CompiledEngine
from tl_vpd.training.engine.eager import EagerEngine
from tl_vpd.training.engine.records import CleanForward, LossTerm

__all__ = ["CleanForward", "CompiledEngine", "EagerEngine", "LossTerm", "engine_of"]
