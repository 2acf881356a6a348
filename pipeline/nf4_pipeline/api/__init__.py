"""What users call from Python; docs/python-api.md shows it. The command line stands on it.

building.py    a model's name in, a verified artifact out
rebuilding.py  artifacts that others published, derived again
artifact.py    an artifact: what it is, and what can be done with it
options.py     options, as keywords or of the command line -> request, recipe, machine, target
interrupts.py  Ctrl-C, as a Python program expects it

`load`, `load_tokenizer` and `prompt` are those of runtime/.
"""
