"""What runs came to, beside each other: from their directories alone.

    figures.py    a run's numbers, and which experts its tokens go to
    variants.py   runs that differ in their seed alone as one, a sweep as a table, and which variant is better
    plots.py      figures
    page.py       the page of `mhmoe report`, by page.html

No cluster is asked.
"""
