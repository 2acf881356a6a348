"""Evidence about an artifact, gathered from outside: its files, and its behaviour when reloaded.

check_files.py      every file and stored tensor against the manifest
check_model.py      every reloaded layer against manifest and source
prompts.py          the questions that both models are asked
reference.jsonl     those that come with the package
eval_text.py        the text on which both models are compared, cut into sequences
texts/              the one that comes with the package, in five domains
launch.py           has both models loaded and asked, each in a process of its own
messages.py         what those processes are asked, and what they reply
source_worker.py    run there: loads the 16-bit model and asks it
artifact_worker.py  run there: loads the 4-bit model, compares it with the other, and asks it
shares.py           what came of comparing them on a share of the text, elsewhere
on_ray.py           shares as tasks of a Ray cluster
generation.py       what a model writes, how fast, and where two answers part
batches.py          prompts answered many at a time
compare_models.py   both models on the same tokens, block by block
compare_weights.py  the files of the artifact against those of the source, tensor by tensor
worst_tokens.py     where they differ most, and what each of them expected there
distance.py         how far layers and blocks are from those of the 16-bit model
baseline.py         the same model with other codes, as a third one beside them
costs.py            what loading and asking took
document.py         verification.json, as a class
assemble_document.py  checks and replies -> that class, with the verdict
verification.schema.json  its published JSON Schema
"""
