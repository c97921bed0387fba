"""What goes to the Hugging Face Hub with a decomposition: its card, and one commit of all files."""

from tl_vpd.publishing.card import model_card
from tl_vpd.publishing.config import CardConfig, Report
from tl_vpd.publishing.push import push

__all__ = ["CardConfig", "Report", "model_card", "push"]
