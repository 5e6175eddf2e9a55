"""Expert-parallel dispatch (`cluster.dispatch`): send rows to the ranks of their experts, and the outputs back.

    flat.py           each route's row goes directly to its expert's rank
    hierarchical.py   each row goes once to each node with experts for it, and each node sends one sum of outputs back
    inner_pass.py     computation inside an autograd function, so that a dispatch can choose when its backward runs
    exchange.py       the uneven all-to-all of both dispatches, with counts of its bytes and a timer of a rank's waits

A row is a sub-token, or a token if the model has one head; a route is one choice of an expert by a row. Both dispatches
exchange any number of rows and drop none; their results differ only by rounding. Every rank takes part in every
exchange, forward and backward, even without rows.

Shape suffixes beside those of `mhmoe_kernels`, where P has another meaning: P ranks of the group, J = P - 1 other ranks
in rank order, X experts of one rank, G nodes, S received rows, W = N + S. R rows are sorted by destination, with
dropped routes last. L, in `count_LE`, is the number of mixture-of-experts layers.
"""
