"""Flat and hierarchical dispatch in turn, on two nodes of two ranks that are made up on one machine.

cases.py      the layers, which cost the same multiply-adds, the routes drawn for them, and the slow link
rank.py       what each of the four processes does
measure.py    starts them and puts their figures together
"""
