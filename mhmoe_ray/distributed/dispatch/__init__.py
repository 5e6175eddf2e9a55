"""Expert-parallel dispatch, `cluster.dispatch`: rows to the ranks that hold their experts, and the outputs back.

    flat.py           each route's row goes straight to its expert's rank
    hierarchical.py   each row goes to a node once, whatever it has there, then to ranks of that node; sums come back
    exchange.py       the uneven all-to-all of both, what it sends, and how long a rank waits in it

Both are uneven and dropless, and give the same outputs and gradients but for rounding. A rank with no rows to send or
none received takes part in every exchange, forward and backward.

Suffixes beside the kernels' own, P another than there: P ranks of the group, J = P - 1 others in the order of their
ranks, X experts held by one rank, G nodes, S rows received, W = N + S. R rows are sorted by where they go, with dropped
routes last. L, in `count_LE`, is the model's.
"""
