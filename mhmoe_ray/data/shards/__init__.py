"""The prepared data: a folder of packed samples.

manifest.py   the manifest: the contents of the folder, and the settings that made it
files.py      Arrow files of samples: writing, reading and verifying them
"""
