"""An artifact derived again from its pinned source, and compared. Nothing of it is kept.

source.py       manifest -> the checkpoint that it pins, with every file's hash checked
origin.py       who else says that the source is of the repo and commit that the manifest names
calibration.py  the artifact's tokens -> calibrated codes and scales, chosen again
derive.py       checkpoint + recipe -> what every file of the artifact must hash to, streaming
compare_files.py  the artifact against that; the first difference, down to tensor and byte
reproduce.py    all of it in turn
"""
