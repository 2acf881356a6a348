"""Who made an artifact from what, in forms that other programs check.

    statement.py               an in-toto statement with SLSA build provenance v1. Pure
    provenance.schema.json     what provenance.json must look like here
    summary.py                 a SLSA verification summary of an artifact derived again
    summary.schema.json        what such a summary looks like here
    bom.py                     a CycloneDX bill of materials. Pure
    identifiers.py             package URLs, licenses, versions of tools
    ci_run.py                  the CI run that it was made in, if everybody may see that
    signing.py                 OpenSSF model signing, with a key file or an identity
    keyless.py                 who signs without a key: CI's identity, and Sigstore

docs/provenance.md says what is claimed, and what is not.
"""
