"""Checkpoints that are Python pickles (`pytorch_model*.bin`), turned into safetensors.

A pickle is a program. So it takes the user's word (`--allow-pickle`), and there are these defences:

scan.py      reads the program without running it, and lets only rebuilding of tensors pass
sizes.py     lets no tensor pass that is more than the bytes that are there
convert.py   a folder of pickles -> a folder of safetensors, each file by a process of its own
worker.py    that process: no token, torch's own restricted loader, one tensor at a time
"""
