"""Routers, which choose the experts of each row (a sub-token) of a mixture-of-experts layer.

base.py     the interfaces of routers and of the modules that compute logits
scores.py   the modules that compute logits over the experts
table.py    the table of the modules in scores.py, by the name of the router
top_k.py    the choice of experts by their logits, gates, and expert capacity
balance.py  load balancing losses, the selection bias, and the router z-loss
groups.py   logits of rows in groups with separate weights
domain.py   the router that sends a sequence to the expert of its domain
"""

from mhmoe_ray.model.router.balance import route_counts, updated_bias
from mhmoe_ray.model.router.base import NO_CONTEXT, BaseRouter, Routing, RoutingContext
from mhmoe_ray.model.router.domain import DomainRouter
from mhmoe_ray.model.router.scores import LinearScores
from mhmoe_ray.model.router.table import SCORES_BY_ROUTER
from mhmoe_ray.model.router.top_k import Router

__all__ = [
    "NO_CONTEXT",
    "SCORES_BY_ROUTER",
    "BaseRouter",
    "DomainRouter",
    "LinearScores",
    "Router",
    "Routing",
    "RoutingContext",
    "route_counts",
    "updated_bias",
]
