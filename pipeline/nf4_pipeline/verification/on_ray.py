"""The text on which both models are compared, dealt out as tasks of a Ray cluster.

Each task runs both models over a share of the sequences, block after block, on a GPU of its own or
on the processors of a node. What they find is brought together where all else is verified.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from nf4_pipeline.cluster.ray_tasks import Claim, Cluster
from nf4_pipeline.cluster.seen_folders import check_seen
from nf4_pipeline.verification.messages import ArtifactRequest, Baselines, SavedCodes
from nf4_pipeline.verification.shares import Share


def claim_of_share(device: str, node: Claim, cpus: int, gpus: int) -> tuple[Claim, int]:
    """What a task takes, and how many there are.

    Args:
        device: that the rest is verified on, "cpu" or "cuda:N".
        node: all of the largest node.
        cpus: of the cluster.
        gpus: of the cluster.
    """
    if device != "cpu":
        return Claim(cpus=1, gpus=1), gpus
    claim = Claim(cpus=max(1, node.cpus))
    return claim, cpus // claim.cpus


def compare_on_ray(request: ArtifactRequest, cluster: Cluster, folder: Path) -> tuple[Path, ...]:
    """Has the comparison done by tasks, if there can be several.

    Args:
        request: what the process is asked that runs the artifact here.
        cluster: where they run.
        folder: where what they found is left.

    Returns:
        Files of what they found, for `ArtifactRequest.shares`; none if there was but one task.

    Raises:
        ResourceError: a node does not see export and source, or lost its worker too often.
        ArtifactError: the artifact cannot be loaded.
        SourceError: its source cannot be loaded.
        RecipeError: the text is too short for one sequence.
    """
    claim, count = claim_of_share(request.device, cluster.largest, cluster.cpus, cluster.gpus)
    if count < 2:
        return ()
    there = replace(
        request,
        source=request.source.absolute(),
        artifact=request.artifact.absolute(),
        device="cuda:0" if claim.gpus else "cpu",
        prompts=(),
        baselines=replace(request.baselines, before_learning=_absolute(request.baselines)),
    )
    found = cluster.run(partial(compare_share, there, count), range(count), claim)
    paths: list[Path] = []
    for share in found:
        if share is not None:
            paths.append(folder / f"share-{len(paths)}.npz")
            share.save(paths[-1])
    return tuple(paths)


def _absolute(baselines: Baselines) -> dict[str, SavedCodes] | None:
    saved = baselines.before_learning
    if saved is None:
        return None
    return {name: replace(codes, file=codes.file.absolute()) for name, codes in saved.items()}


def compare_share(request: ArtifactRequest, of: int, number: int) -> Share | None:
    """A task: both models on a share.

    Raises:
        ResourceError: the node does not see export and source.
        PipelineError: as of `artifact_worker.compare_share`.
    """
    check_seen(request.artifact, request.source, otherwise="verify without --engine ray")
    from nf4_pipeline.verification import artifact_worker

    return artifact_worker.compare_share(request, number, of)
