"""Training under differential privacy with Opacus: two ways to give `PrivacyEngine` a converted network."""

from normprop.integrations.opacus.lane_optimizer import LaneOptimizer
from normprop.integrations.opacus.private_network import PrivateNetwork
from normprop.integrations.opacus.whole_network import WholeNetwork

__all__ = ["LaneOptimizer", "PrivateNetwork", "WholeNetwork"]
