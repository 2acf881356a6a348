"""The stages. Each reads the records before it, does one thing, and writes its record last.

    run_recorded.py  what a stage is; forget the record, work, write the record
    preflight.py     what can be known of a checkpoint before its first weight is read
    download_request.py  which checkpoint is wanted, and where its build folder shall be
    find_source.py   a name -> a checkpoint that was found, looked at, fetched and hashed
    hub_files.py     a model of the Hub, looked at before its weights are fetched, then fetched
    streamed_source.py  weights that stay on the Hub: planned by headers, passed by, served
    streamed_bytes.py  what a streamed source takes over the network, by its headers
    forecast.py      what a build would read, write and take, before a byte of weights moves
    cost_model.py    what it takes, from rates of hosts, disks and networks
    publication.py   the card, provenance and bill of materials of an export, for the repo they name
    download.py      a name -> a pinned, hashed checkpoint in source/
    quantize.py      source/ -> quantized/
    quantize_parts.py  a part of it by one of several processes; all parts -> one record
    quantize_on_ray.py  each file a part, made by a task of a Ray cluster
    sent_source.py   the source, for tasks that do not see the build folder
    folder_progress.py  how far several processes are, as their common folder shows it
    rounding_choice.py  on the processors or on GPUs, by an estimate of both times
    serialize.py     quantized/ -> export/: the artifact and its manifest
    verify.py        export/ against source/ -> verification.json, report, the verdict
    other_artifact.py  another one of the same source, compared with the one that is verified
    attest.py        export/ -> model card, provenance.json and bom.cdx.json in it
    outgoing.py      what becomes of finished files: they stay here, or make room
    upload_ahead.py  finished files, sent to the Hub before a push names them
    remade.py        an export whose weights the Hub alone has, made again in memory for verify
    push.py          export/ -> what would be, or is, on the Hub

A stage is a frozen object, made once with what it needs: its build folder, the recipe, the machine,
a reporter. `key()` says when it is up to date, `run()` does the work. `Download` makes the build
folder itself, and `Push` asks the Hub instead of a key. No stage imports another: what they know of
each other stands in the records (`nf4_pipeline/records.py`).
"""
