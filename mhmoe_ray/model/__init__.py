"""The model, torch only.

Shape suffixes: those of mhmoe_kernels (N D K E R F and others), and

    B  sequences in a batch       H  attention heads
    T  tokens in a sequence       C  width of an attention head
    V  vocabulary                 M  width of the model (d), before it is split into sub-tokens
    L  mixture-of-experts layers  Q  width of X-MoE's routing projection

The papers, their tables and their code disagree. Each reading below is an option of `spec/model.py`; * is the default.
P1 is the first paper (arXiv 2404.15045), P2 the follow-up (arXiv 2411.16205), X-MoE is arXiv 2204.09179.

    | topic, option                   | readings                                     | why that default            |
    | ------------------------------- | -------------------------------------------- | --------------------------- |
    | residual around a sub-token     | false* P2 and all code; true P1's equation 6 | what was run                |
    |   sub_token_residual            |                                              |                             |
    | router                          | linear* P1's equation 5, P2; xmoe P1's text; | P2's, nothing to tune       |
    |                                 | xmoe_torchscale P1's runs                    |                             |
    | width of X-MoE's projection     | E / 2* X-MoE; 16 P1's code (xmoe_torchscale  | best in X-MoE's own         |
    |   router_dim                    | has no other); 16 / h P1's table             | comparison                  |
    | weights divided by their sum    | false* P2's code; true P1, and P2's script   | what P2's code computes     |
    |   normalize_gates               | to no effect                                 |                             |
    | rows beyond an expert's share   | null*, all are kept: P1's authors in review; | causal: drops depend on     |
    |   capacity_factor               | 1.0 the code of both                         | later rows                  |
    | second choice                   | always* P2; random P1's runs                 | random is for top-2 alone   |
    |   second_expert                 |                                              |                             |
    | choices the balance loss counts | first* the code of both; all P1's equation   | what was run                |
    |   balance_choices               |                                              |                             |
    | dropout, attention_dropout      | 0* P2's script; 0.1 P1's scripts (its table  | P2's                        |
    |                                 | says both)                                   |                             |
    | hidden width of an expert       | 4 beta d P1's appendix; 4 beta h d P2 and    | none: it must be given      |
    |   d_expert                      | P1's parameter counts                        |                             |

No options: projections have biases, as in the code of both, even where P2's model has none elsewhere; P1's code drops
second choices at random in evaluation too, we never do; X-MoE's sigmoid gate, and torchscale's division of weights
after drops, are left out.

Other designs are made of these parts, not backbones of their own. DeepSeekMoE: many narrow experts and `d_shared`.
Mixtral: `kv_heads`, `tied_embeddings: false`, `every: 1`, `normalize_gates: true`. Both are presets (planner/). Not
offered is SMEAR (soft merging of experts, arXiv 2306.03745): its router averages over the whole sequence, which in a
decoder lets later tokens reach back, and it merges weights into one expert where all else here sends rows to experts.
"""
