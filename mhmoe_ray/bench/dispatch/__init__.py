"""Flat and hierarchical dispatch in turn, on two nodes of two ranks that are made up on one machine.

cases.py      the layers, which cost the same multiply-adds, and the routes that are drawn for them
cases.py       two network namespaces with a slow link between them
rank.py       what each of the four processes does
measure.py    starts them and puts their figures together
"""
