"""What transformers knows of an architecture, without weights: the one room for meta models.

config.py      config.json of a stranger -> a transformers config; remote code is never run
plausible.py   its sizes against the weights, before a model is built from them
linear.py      which modules are plain linear maps, decided by what they compute
skeleton.py    the model on the meta device -> the facts that selection needs
"""
