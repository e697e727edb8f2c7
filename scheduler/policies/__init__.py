"""Policies, chosen by name: who goes first, who may start, what is kept."""

from treadle.scheduler.policies.admission import ADMISSIONS, AdmissionPolicy
from treadle.scheduler.policies.books import Books, Foresight
from treadle.scheduler.policies.order import ORDERS, OrderPolicy
from treadle.scheduler.policies.residency import MOST_SKIPPED, Residency
from treadle.scheduler.policies.retention import RETENTIONS, RetentionPolicy

__all__ = [
    "ADMISSIONS",
    "MOST_SKIPPED",
    "ORDERS",
    "RETENTIONS",
    "AdmissionPolicy",
    "Books",
    "Foresight",
    "OrderPolicy",
    "Residency",
    "RetentionPolicy",
]
