"""Which ranks form which expert-parallel group. Pure: nodes in, ranks out; no torch, no ray."""
