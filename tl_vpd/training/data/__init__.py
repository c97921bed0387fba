"""What a run trains on, batch by batch."""

from tl_vpd.training.data.batches import ProcessBatches, batches_of
from tl_vpd.training.data.datasets import is_dataset, token_column
from tl_vpd.training.data.protocol import Batches

__all__ = ["Batches", "ProcessBatches", "batches_of", "is_dataset", "token_column"]
