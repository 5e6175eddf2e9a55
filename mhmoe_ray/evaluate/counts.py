"""Where the tokens of some text go, as it is kept: read without torch."""

from pydantic import BaseModel


class RoutingCounts(BaseModel):
    """Of some text. L mixture-of-experts layers, E experts, h heads, k choices of each sub-token."""

    tokens: int
    counts: list[list[int]]
    """L x E: routes."""
    tokens_of: list[list[int]]
    """L x E: tokens of which at least one sub-token goes there."""
    distinct: list[list[int]]
    """L x (h*k + 1): tokens by the number of different experts that their sub-tokens go to together."""
    agreement: list[list[list[int]]]
    """L x h x h: tokens whose sub-tokens i and j have the same first choice."""
    first_weight: list[float]
    """L: sum of the first choices' weights over all sub-tokens."""
