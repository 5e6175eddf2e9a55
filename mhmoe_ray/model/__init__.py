"""The model, torch only.

Shape suffixes: those of mhmoe_kernels (N D K E R F), and

    B  sequences in a batch       H  attention heads
    T  tokens in a sequence       C  width of an attention head
    V  vocabulary                 M  width of the model (d), before it is split into sub-tokens
    L  mixture-of-experts layers  Q  width of X-MoE's routing projection
"""
