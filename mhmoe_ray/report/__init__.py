"""What runs came to, beside each other: from their directories alone.

    figures.py    a run's numbers
    variants.py   runs that differ in their seed alone, as one
    variants.py      a sweep as one table
    variants.py    which of two variants is better, and how sure that is
    figures.py     which experts a run's tokens go to
    plots.py      figures
    page.py       the page of `mhmoe report`, by page.html

No cluster is asked.
"""
