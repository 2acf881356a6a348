"""Running a model: loading an artifact on any transformers, and generating text with it.

artifact.py        what a name means: an artifact, a build, a plain checkpoint, a Hub id
loader.py          an artifact (or a plain checkpoint, quantized while loading) -> a model
generate.py        text in, text out
prompt.py          the same for users: in a process of its own that stays for the next prompt
prompt_worker.py   that process
bnb_cpu_fixes.py   4-bit layers that bitsandbytes computes wrongly on a CPU, put right
determinism.py     the same numbers each time: what torch otherwise leaves to chance
threads.py         how many threads of the CPU an operation of torch gets
"""
