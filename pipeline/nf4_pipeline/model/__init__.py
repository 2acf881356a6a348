"""What transformers knows of an architecture, without weights: the one room for meta models.

config.py      config.json of a stranger -> a transformers config; remote code is never run
plausible.py   its sizes against the weights, before a model is built from them
linear.py      which modules are plain linear maps, decided by what they compute
names.py       checkpoint names -> names in the model; merges that transformers does on loading
precision.py   the precision that transformers would load a checkpoint in
skeleton.py    the model on the meta device -> the facts that selection needs
"""
