"""Evidence about an artifact, gathered from outside: its files, and its behaviour when reloaded.

gates.py          every file and every stored tensor against the manifest, without loading it
prompts.py        the questions that both models are asked
reference.jsonl   those that come with the package
worker.py         a fresh process that loads one model, answers and scores; `python -m`
run.py            starts workers and reads what they found
"""
