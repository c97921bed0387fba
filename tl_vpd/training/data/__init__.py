"""Token batches in an order that follows from seed and step alone."""

from tl_vpd.training.data.batches import Batches, ProcessBatches, batches_of

__all__ = ["Batches", "ProcessBatches", "batches_of"]
