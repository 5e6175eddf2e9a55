"""Reports that compare runs, from their run directories alone.

    figures.py    the metrics of a run, and the experts that its tokens go to
    variants.py   runs that differ only in their seed as one variant, and a sweep as a table
    seeds.py      values of two variants by seed: their difference, its test, and what a number of seeds can show
    verdicts.py   which variant is better, equal within a margin, or undecided
    quality.py    accuracies, precisions and recalls of evaluations that all runs have
    comparison.py which runs count, the step at which they are compared, and the verdicts
    plots.py      plots
    page.py       the page of `mhmoe report`, from page.html

A report needs no cluster: no request is sent to one.
"""
