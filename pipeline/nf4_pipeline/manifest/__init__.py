"""The manifest: what an artifact holds and what it was made from. Deterministic.

No clock, host, path or user is in it: the same source and recipe give the same manifest anywhere.

    manifest.py            `Manifest` and its parts, as documents
    assemble.py            pure: plan + digests -> manifest
    small_files.py         config.json, the index, and the files that travel as they are
    artifact_files.py      all files beside the weights, the manifest among them, put together
    read.py                an artifact's manifest, checked against the schema
    manifest.schema.json   the published JSON Schema
"""
