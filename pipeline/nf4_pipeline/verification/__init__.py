"""Evidence about an artifact, gathered from outside: its files, and its behaviour when reloaded.

gates.py          every file, stored tensor and reloaded layer against the manifest
prompts.py        the questions that both models are asked
reference.jsonl   those that come with the package
text.py           the text on which both models are compared, cut into sequences
texts/            the one that comes with the package, in five domains
worker.py         a fresh process that loads one model and does what is asked; `python -m`
answers.py        what a model writes, how fast, and where two answers part
distance.py       both models on the same tokens, block by block
nearest.py        plain round to nearest, as a third one beside them
run.py            starts workers and reads what they found
"""
