"""A model's name in, a verified artifact out."""

from __future__ import annotations

from collections.abc import Sequence

from nf4_pipeline.api.artifact import Artifact
from nf4_pipeline.api.interrupts import interruptible
from nf4_pipeline.api.options import (
    PathName,
    RecipeLike,
    make_machine,
    make_recipe,
    make_request,
    make_target,
)
from nf4_pipeline.machine import DEFAULT_MEMORY_BUDGET
from nf4_pipeline.progress import ProgressCallback, reporting_to


def build(
    model: PathName,
    *,
    revision: str | None = None,
    recipe: RecipeLike | None = None,
    calibrate: PathName | None = None,
    extra_bytes: str | None = None,
    effort: str | None = None,
    max_shard_size: str | None = None,
    prompts: PathName | None = None,
    eval_text: PathName | None = None,
    eval_tokens: int | None = None,
    device: str = "auto",
    require_gpu: bool = False,
    workers: int = 0,
    memory_budget: str | int = DEFAULT_MEMORY_BUDGET,
    device_memory: str | int | None = None,
    engine: str = "local",
    ray_address: str | None = None,
    build_dir: PathName | None = None,
    replace: bool = False,
    offline: bool = False,
    allow_pickle: bool = False,
    allow_unhashed: bool = False,
    allow_unused: Sequence[str] = (),
    strip_prefix: str = "",
    stream_source: bool = False,
    stream_output: str | None = None,
    check: bool = False,
    progress: ProgressCallback | None = None,
) -> Artifact:
    """Downloads, quantizes, serializes, verifies and attests a model, as `nf4 build` does.

    What is done and still valid is not done again: after a failure or an interrupt, the same call
    goes on where it was.

    Args:
        model: a Hub id, a local folder, or "sample", which comes with the package.
        revision: branch, tag or commit of a Hub model; None for its main branch.
        recipe: everything that shapes bytes and verdict: a `Recipe`, a TOML file, or its tables as
            a mapping, such as {"verify": {"max_mean_kl": 0.1}}. What a keyword says beside it wins.
        calibrate: "self" or a text or JSONL file: codes and scales are chosen from the model's
            activations on tokens that it writes itself, or on that text.
        extra_bytes: with `calibrate`, how many more bytes may go to leaving the layers that lose
            most in 16 bit, such as "5%".
        effort: with `calibrate`, "high" lets the codes learn from the 16-bit model; block by block
            where the device cannot hold it twice and as much again.
        max_shard_size: of one weight file, such as "500MB"; 1 GB without it.
        prompts: a JSONL file of {"prompt", "expect", "chat"} to ask both models.
        eval_text: a text file on which both models are compared.
        eval_tokens: how many tokens of that text, at most.
        device: "auto", "cpu", "cuda" (quantizes and calibrates on all GPUs, verifies on the first)
            or "cuda:N".
        require_gpu: fail at once where there is no GPU to verify on.
        workers: threads that quantize; 0 for as many as keep the device busy.
        memory_budget: bytes of all buffers of the engine together, as a number or such as "1GiB".
        device_memory: how much of the device verifying may use, as a number of bytes or such as
            "8GB"; all that is free without it.
        engine: "local", or "ray": each file is quantized by a task of a Ray cluster, all of whose
            nodes see the build folder and the source, unless `build_dir` is a URL; one of them
            calibrates, and several compare with the 16-bit model. The bytes are the same.
        ray_address: of the cluster; "auto" for the one that this host is a node of. Without it, the
            one that RAY_ADDRESS says, or else one that is started for this build.
        build_dir: the build folder; None for one under ./artifacts that is named for the model and,
            where it is not the default, for the recipe. Or a URL such as "s3://bucket/folder": what
            is done is kept there, and a copy under ./artifacts.
        replace: a build folder that is another build may become this one.
        offline: take a Hub model as it is cached.
        allow_pickle: scan and convert weights that are pickles, where there are no others.
        allow_unhashed: take files for which the Hub lists no hash, too.
        allow_unused: patterns of tensors that the model has no place for and may be left out.
        strip_prefix: what a wrapper left before the names of all tensors, such as "module.".
        stream_source: the weights of a Hub model come in stretches while they are quantized, and go
            again; verify fetches them once more, block by block.
        stream_output: a Hub repo, ORG/NAME: finished files go there while others are made, seen by
            nobody, until one commit names them if the verdict is "pass". With `stream_source`, what
            the Hub has received is not kept here.
        check: hash everything again, also what looks untouched since it was hashed.
        progress: called with each `ProgressEvent`. What it raises ends the build; what is finished
            is kept.

    Returns:
        The artifact, whether its verdict is "pass" or "fail".

    Raises:
        UsageError: the name or an option means nothing, or Ray is asked for and not installed;
            `RecipeError` for the recipe.
        SourceError: the checkpoint cannot be used.
        HubError: the Hub refuses, does not answer, or sends wrong bytes.
        BuildError: another process works in the build folder, it is another build and may not be
            replaced, or it cannot be worked in.
        StoreError: the store at a URL refuses, does not answer, or holds something else.
        ArtifactError: what was written is not what it should be.
        ResourceError: disk, memory or the device that was asked for is lacking.
        KeyboardInterrupt: the user stopped it; the text says what is kept.
    """
    options = make_recipe(
        recipe,
        calibrate=calibrate,
        extra_bytes=extra_bytes,
        effort=effort,
        max_shard_size=max_shard_size,
        prompts=prompts,
        eval_text=eval_text,
        eval_tokens=eval_tokens,
    )
    machine = make_machine(
        device=device,
        require_gpu=require_gpu,
        workers=workers,
        memory_budget=memory_budget,
        device_memory=device_memory,
        engine=engine,
        ray_address=ray_address,
    )
    request = make_request(
        model,
        revision=revision,
        offline=offline,
        allow_pickle=allow_pickle,
        allow_unhashed=allow_unhashed,
        check=check,
        allow_unused=allow_unused,
        strip_prefix=strip_prefix,
        build_dir=build_dir,
        replaces=replace,
        stream_source=stream_source,
    )
    target = None if stream_output is None else make_target(stream_output)
    from nf4_pipeline.job import run_build
    from nf4_pipeline.records import ATTEST, SERIALIZE, VERIFY

    with interruptible(), reporting_to(progress) as reporter:
        made, _ = run_build(request, options.recipe, machine, reporter, target)
        made.fetch(SERIALIZE, VERIFY, ATTEST)
    return Artifact.open(made.export)
