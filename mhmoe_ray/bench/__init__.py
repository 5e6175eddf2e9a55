"""Side-by-side measurements: what a layer costs, beside a dense one of the same multiply-adds.

timing.py     interleaved rounds, medians and ratios
layers.py     layers that are matched, and one pass of each
"""
