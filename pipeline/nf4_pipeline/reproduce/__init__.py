"""An artifact derived again from its pinned source, and compared. Nothing of it is kept.

source.py     manifest -> the checkpoint that it pins, with every file's hash checked
derive.py     checkpoint + recipe -> what every file of the artifact must hash to, streaming
compare.py    the artifact against that; the first difference, down to tensor and byte
run.py        the three in turn
"""
