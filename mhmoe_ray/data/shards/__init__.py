"""A folder of prepared samples.

manifest.py   what is in it, and what made it
files.py      its Arrow files: written, read and verified
"""
