"""What transformers knows of an architecture, without weights: the one room for meta models.

architecture.py   what an architecture says of the tensors of a checkpoint: plain data, no torch
config.py         config.json, untrusted -> a transformers config; remote code is never run
check_folder.py   the one door to a model folder: links, sizes, names, headers, what they add up to
config_limits.py  its sizes against the weights, before a model is built from them
named_class.py    whether the class that is built is the one that config.json names
linear.py         which modules are plain linear maps, decided by what they compute
tensor_names.py   checkpoint names -> names in the model; merges that transformers does on loading
load_dtype.py     the precision that transformers would load a checkpoint in
fast_attention.py   has a Falcon on a GPU compute attention by fast kernels
exposed_weights.py  layers whose weight the model uses itself, found by watching it
meta_model.py     the model on the meta device -> its architecture
fit.py            whether the tensors of a checkpoint and the model belong together
missing_tensors.py  what the model needs and the checkpoint lacks: what happened, the way out
name_patterns.py  names against patterns with `*`, in little time
unused_tensors.py   what the model has no place for: buffers, known heads, or a reason to stop
generation_config.py  what of generation_config.json answers follow
limited_tokenizer.py  a tokenizer and its chat template, asked within limits
tokenizer_facts.py  what is known of a tokenizer before the work: plain data
tokenizer_probe.py  loads a tokenizer and tries its chat template
probe.py          asks for architecture and tokenizer in a process of its own
probe_worker.py   that process
"""
