"""The one protocol for all child processes.

    parent: worker.start(request, reporter) ──► Child.wait() ──► reply
              │ stdin: Envelope, then its end      ▲ stdout: one Message a line, the reply last
              ▼                                    │
    child:  python -P -m nf4_pipeline.processes.child_side MODULE ──► MODULE.run(request, reporter)

A worker module defines one function, `run(request, reporter) -> reply`; request and reply are
documents. Whoever wants it run describes it once: `Worker(MODULE, ReplyType, limits, environment)`.

worker.py       what a worker or a script is: its code, its reply, its limits, its environment
parent_side.py  the parent's side: start, progress, reply, and what is said when it fails
in_process.py   for tests: workers run in the process that asks for them
child_side.py   the child's side: limits, death with the parent, every exception reported
messages.py     what both sides say to each other
"""
