"""The jobs of a batch, one by one; a failure ends one of them, an interrupt all."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from nf4_pipeline.batch.queue import Job
from nf4_pipeline.batch.results import Result
from nf4_pipeline.errors import PipelineError, StoppedError
from nf4_pipeline.job import run_build
from nf4_pipeline.progress import Reporter
from nf4_pipeline.records import SERIALIZE, VERIFY
from nf4_pipeline.verification.document import MeasuredVerification


def run_jobs(jobs: Sequence[Job], reporter: Reporter) -> Iterator[Result]:
    """Builds one after the other, and says of each what came of it.

    What is done and still valid is not done again, so that a batch that was stopped goes on.

    Args:
        jobs: in the order in which they are done.
        reporter: told of each, and how far it is.
    """
    stopped = False
    for number, job in enumerate(jobs, 1):
        if stopped:
            yield Result(model=job.name, options=job.options, outcome="not run")
            continue
        said = f" ({job.options})" if job.options else ""
        reporter.note(f"{number} of {len(jobs)}: {job.name}{said}")
        begin = time.monotonic()
        try:
            result = _build(job, reporter)
        except PipelineError as error:
            stopped = isinstance(error, StoppedError)
            reporter.note(f"{job.name}: {error}")
            result = Result(
                model=job.name,
                options=job.options,
                outcome="error",
                error=str(error),
                seconds=round(time.monotonic() - begin, 1),
            )
        yield result


def _build(job: Job, reporter: Reporter) -> Result:
    build, stages = run_build(job.request, job.recipe, job.machine, reporter)
    totals, verification = build.need(SERIALIZE).facts.totals, build.need(VERIFY).facts
    measured = verification.fidelity if isinstance(verification, MeasuredVerification) else None
    return Result(
        model=job.name,
        options=job.options,
        outcome=verification.verdict,
        build=str(build.root),
        seconds=round(sum(stage.record.seconds for stage in stages.values() if stage.ran), 1),
        original_bytes=totals.original_bytes,
        artifact_bytes=totals.artifact_bytes,
        mean_kl=measured.mean_kl.value if measured else None,
        agreement=measured.top1_agreement.value if measured else None,
    )
