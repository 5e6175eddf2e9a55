"""The decoder in torch, and the layers that all families of models share. Nothing here uses Ray.

The name of a tensor ends with one letter for each dimension, as in `x_BTM`. The letters are those of mhmoe_kernels (N D
K E R F and others) and these:

    B  sequences in a batch       H  attention heads
    T  tokens in a sequence       C  width of an attention head
    V  vocabulary size            M  width of the model (d), before it is split into sub-tokens
    L  mixture-of-experts layers  Q  width of X-MoE's routing projection

The papers of MH-MoE, their tables and their code disagree. Each reading in the table is a value of an option in
`spec/moe.py` or `spec/model.py`; * marks the default. P1 is the first paper (arXiv 2404.15045), P2 the follow-up (arXiv
2411.16205). X-MoE is arXiv 2204.09179, and torchscale is the library that P1 used.

    | topic, option                   | readings                                     | why that default            |
    | ------------------------------- | -------------------------------------------- | --------------------------- |
    | residual around a sub-token     | false* P2 and all code; true P1's equation 6 | the authors ran it          |
    |   sub_token_residual            |                                              |                             |
    | router                          | linear* P1's equation 5, P2; xmoe P1's text; | P2's, nothing to tune       |
    |                                 | xmoe_torchscale P1's runs                    |                             |
    | width of X-MoE's projection     | E / 2* X-MoE; 16 P1's code (xmoe_torchscale  | best in X-MoE's own         |
    |   router_dim                    | has no other); 16 / h P1's table             | comparison                  |
    | gates divided by their sum      | false* P2's code; true P1, and P2's script   | P2's code computes it       |
    |   normalize_gates               | without effect                               |                             |
    | routes beyond expert capacity   | null* keeps all: P1's authors in review;     | drops depend on later rows, |
    |   capacity_factor               | 1.0 the code of both                         | which is not causal         |
    | second expert                   | always* P2; random P1's runs                 | random is for top-2 alone   |
    |   second_expert                 |                                              |                             |
    | choices in load balancing loss  | first* the code of both; all P1's equation   | the authors ran it          |
    |   balance_choices               |                                              |                             |
    | dropout, attention_dropout      | 0* P2's script; 0.1 P1's scripts (its table  | P2's                        |
    |                                 | says both)                                   |                             |
    | hidden width of an expert       | 4 beta d P1's appendix; 4 beta h d P2 and    | none: it must be given      |
    |   d_expert                      | P1's parameter counts                        |                             |

Three choices are not options. Projections have biases, as in the code of both papers, though the rest of P2's model
has none. P1's code drops second choices at random in evaluation too; this model never does. X-MoE's sigmoid gate, and
torchscale's division of gates after drops, are not implemented.

The same modules build other published models. DeepSeekMoE has many narrow experts and `d_shared`. Mixtral has
`kv_heads`, `tied_embeddings: false`, `every: 1` and `normalize_gates: true`. Both are presets (planner/). Qwen, OLMoE
and DeepSeek-V3's routing add norms of queries and keys, biases of attention, scaled positions, sigmoid scores and
groups of experts, which are options too. Router `smear` (arXiv 2306.03745) merges experts instead of sending sub-tokens
to them (smear.py). It reads whole samples, so in a decoder later tokens would influence earlier ones.
"""
