"""Edits in the subcomponent basis: made, measured, baked into weights and undone; tuning; what a fine-tuning changed."""

from tl_vpd.editing.bake import Baked, bake
from tl_vpd.editing.difference import Difference, DifferenceConfig
from tl_vpd.editing.edit import Edit
from tl_vpd.editing.evaluate import EditEvaluationConfig, evaluate_edit
from tl_vpd.editing.evaluation import EditEvaluation
from tl_vpd.editing.examples import Wanted
from tl_vpd.editing.finetuning import explain_difference
from tl_vpd.editing.make import add, remove, scale, swap, write_direction, write_token
from tl_vpd.editing.piece import Piece
from tl_vpd.editing.strengths import StrengthConfig, TunedStrengths, gradient_by_subcomponent, tune_strengths
from tl_vpd.editing.training import TrainedEdit, TrainingConfig, train_write_direction

__all__ = [
    "Baked",
    "Difference",
    "DifferenceConfig",
    "Edit",
    "EditEvaluation",
    "EditEvaluationConfig",
    "Piece",
    "StrengthConfig",
    "TrainedEdit",
    "TrainingConfig",
    "TunedStrengths",
    "Wanted",
    "add",
    "bake",
    "evaluate_edit",
    "explain_difference",
    "gradient_by_subcomponent",
    "remove",
    "scale",
    "swap",
    "train_write_direction",
    "tune_strengths",
    "write_direction",
    "write_token",
]
