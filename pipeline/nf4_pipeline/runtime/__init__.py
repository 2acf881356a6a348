"""Running a model: loading an artifact on any transformers, and generating text with it.

artifact.py   what a name means: an artifact, a build, a plain checkpoint, a Hub id
loader.py     an artifact (or a plain checkpoint, quantized while loading) -> a model
generate.py   text in, text out
"""
