"""Images that are stored as they were encoded.

files.py   checks image files, and decodes them
jpeg.py    counts the scans of a JPEG file without decoding it
crops.py   crops of images: pure functions of (seed, part, position)
"""
