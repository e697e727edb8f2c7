"""Policies, chosen by name: `order` says who goes first, `retention` what is evicted first."""

from treadle.scheduler.policies.order import ORDERS, OrderPolicy
from treadle.scheduler.policies.retention import RETENTIONS, RetentionPolicy

__all__ = ["ORDERS", "RETENTIONS", "OrderPolicy", "RetentionPolicy"]
