"""A folder of prepared samples: manifest.py says what is in it, files.py writes and reads its Arrow files."""
