"""What transformers knows of an architecture, without weights: the one room for meta models.

architecture.py   what an architecture says of the tensors of a checkpoint: plain data, no torch
config.py         config.json, untrusted -> a transformers config; remote code is never run
config_limits.py  its sizes against the weights, before a model is built from them
linear.py         which modules are plain linear maps, decided by what they compute
names.py          checkpoint names -> names in the model; merges that transformers does on loading
precision.py      the precision that transformers would load a checkpoint in
meta_model.py     the model on the meta device -> its architecture
probe.py          asks for an architecture in a process of its own
probe_worker.py   that process
"""
