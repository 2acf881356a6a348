"""Published artifacts, fetched and derived again by anybody who wants to know.

    rebuild.py      one artifact after the other; what goes wrong with one is its verdict
    published.py    a repo of the Hub, or a folder: what it lists, and files of it, hashed
    accounting.py   each listed file is derived, a document that nf4 writes, or a difference
    claimed_source.py  the source that a manifest names, before anything of it is fetched
    documents.py    card, provenance and bill of materials, held against what was derived
    signature.py    whether the workflow that provenance names as builder signed the artifact
    results.py      what came of it, as documents; rebuild.schema.json is their published form
    writing.py      summaries (VSA), badges, a table and results.json, into a folder

Nothing that an artifact says is believed, and nothing of it is opened before its name and its size
are known to be those of such a file. Everything that is fetched goes into one folder, and goes.
"""
