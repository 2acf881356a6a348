"""The one protocol for all child processes.

    parent: start(worker, request, reporter) ──► Child.wait() ──► reply
              │ stdin: Envelope, then its end      ▲ stdout: one Message a line, the reply last
              ▼                                    │
    child:  python -P -m nf4_pipeline.processes.child_side MODULE ──► MODULE.run(request, reporter)

A worker module defines one function, `run(request, reporter) -> reply`; request and reply are
documents. Whoever wants it run describes it once: `Worker(MODULE, ReplyType, limits, environment)`.
A `Session` asks one child several times: an Envelope a line, and the child ends with its stdin.

worker.py       what a worker or a script is: its code, its reply, its limits, its environment
parent_side.py  the parent's side: start, progress, reply, and what is said when it fails
fork_server.py  a process that imports once what several workers need, and forks them
forked.py       the parent's side of that
in_process.py   for tests: workers run in the process that asks for them
child_side.py   the child's side: limits, death with the parent, every exception reported
phase.py        limits for a piece of a child's work in which a stranger's program runs
temporary.py    temporary folders, and those that a killed process left
messages.py     what both sides say to each other
"""
