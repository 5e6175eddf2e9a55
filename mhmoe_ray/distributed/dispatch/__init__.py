"""Expert-parallel dispatch, `cluster.dispatch`: send rows to the ranks that hold their experts, and the outputs back.

    flat.py           each route's row goes straight to its expert's rank
    hierarchical.py   each row goes once to each node that has experts for it, then to ranks of that node; sums return
    exchange.py       the uneven all-to-all of both, the bytes that it sends, and how long a rank waits in it

Both dispatches are uneven and dropless, and give the same outputs and gradients but for rounding. A rank that has no
rows to send or receives none takes part in every exchange, forward and backward.

Shape suffixes in addition to those of the kernels, where P has another meaning: P ranks of the group, J = P - 1 other
ranks in rank order, X experts held by one rank, G nodes, S rows received, W = N + S. R rows are sorted by destination,
with dropped routes last. L, in `count_LE`, is that of the model.
"""
