"""A plan for people: the report, and what to change where it does not fit (pure)."""

from __future__ import annotations

from collections.abc import Iterator

from launch.plan_report import Geometry, Report
from trainer.activation_memory import Device
from trainer.memory_plan import GIB
from trainer.model_shape import count


def lines_of(report: Report) -> Iterator[str]:
    """The report for people."""
    shape, data, where = report.shape, report.data, report.target
    trained, all_parameters = count(shape.trained), shape.num_parameters
    yield f"plan of {report.run}"
    yield (
        f"model    {shape.kind}, {all_parameters:,} parameters, {trained:,} trained ({shape.method.value}), "
        f"{shape.precision.value}"
    )
    yield f"         from {report.source}"
    known = (
        f"{data.packs:,} packs, {data.tokens:,} tokens; " if data.packs is not None else "packs and tokens unknown: "
    )
    yield f"data     {known}{data.note}"
    yield f"steps    {f'{report.steps:,}' if report.steps else 'unknown: training.epochs counts the data'}"
    yield from _geometry_lines(report.geometry)
    yield ""
    yield f"memory of one {'GPU' if where.device == Device.GPU else 'worker'}, GiB"
    for name, size in report.memory.held.items():
        yield _figure(name, size)
    for moment, parts in report.memory.moments.items():
        mark = "  <- the worst moment" if moment == report.memory.worst else ""
        yield f"  in {moment.value}, on top:{mark}"
        for name, size in parts.items():
            yield _figure(f"  {name}", size)
    yield _figure("runtime and libraries (an allowance)", report.memory.runtime)
    if report.memory.slack:
        yield _figure("allocator (an allowance)", report.memory.slack)
    verdict = "fits" if report.memory_fits else "DOES NOT FIT"
    yield f"  needed {_gib(report.memory.required_bytes)} of {_gib(where.memory_bytes)} ({where.source}): {verdict}"
    if not shape.like_llama:
        yield "  its layers are not those that the activation formulas were made for: take activations as a rough guess"
    yield ""
    yield from _host_and_disk_lines(report)


def _geometry_lines(geometry: Geometry) -> Iterator[str]:
    least, most = geometry.packs_per_rank
    each = f"{most}" if least == most else f"{least} to {most}"
    yield (
        f"batch    {geometry.global_batch} packs a step ({geometry.tokens_per_step:,} tokens at most) over "
        f"{_workers(geometry.workers)}: {each} packs each, in {geometry.grad_accum_steps} micro batches of "
        f"{geometry.micro_batch}"
    )
    busy = geometry.global_batch / (geometry.workers * geometry.grad_accum_steps * geometry.micro_batch)
    if busy < 1:
        yield (
            f"         {1 - busy:.0%} of the micro batches' places stay empty; training.global_batch a multiple of "
            f"{geometry.workers * geometry.micro_batch} would fill them"
        )


def _host_and_disk_lines(report: Report) -> Iterator[str]:
    disk, per_node = report.disk, report.target.workers_per_node
    each = report.staging_bytes_per_worker
    yield (
        f"host     {_gib(each * per_node)} on a node of {_workers(per_node)} ({_gib(each)} each) for the copy that "
        "saves write"
    )
    yield f"disk     {_gib(disk.checkpoint_bytes)} a checkpoint, {disk.kept} at once while a new one is written"
    for name, size in disk.exports.items():
        yield f"         {_gib(size)} export ({name})"
    dataset = _gib(disk.dataset_bytes) if disk.dataset_bytes is not None else "unknown"
    verdict = "fits" if disk.fits else "DOES NOT FIT"
    free = "free room unknown" if disk.free_bytes is None else f"{_gib(disk.free_bytes)} free: {verdict}"
    yield f"         {dataset} dataset"
    yield f"         {_gib(disk.needed_bytes)} in all under run.storage, {free}"
    if each := disk.fast_bytes_per_worker:
        yield f"         {_gib(each * per_node)} on a node's own disk for the fast tier"


def problem(report: Report) -> str | None:
    """What does not fit, and what to change; None where all fits."""
    parts = []
    if not report.memory_fits:
        parts.append(_memory_problem(report))
    if not report.disk.fits:
        parts.append(
            f"run.storage needs {_gib(report.disk.needed_bytes)} and has {_gib(report.disk.free_bytes or 0)} free: "
            "lower checkpoint.keep_last, make room, or give another run.storage"
        )
    return "\n".join(parts) or None


def _memory_problem(report: Report) -> str:
    target = report.target
    head = (
        f"a worker needs {_gib(report.memory.required_bytes)} and has {_gib(target.memory_bytes)} ({target.source}); "
        f"the worst moment is {report.memory.worst.value}. One of these would change it:"
    )
    listing = [
        f"  {remedy.change}: {_gib(remedy.required_bytes)}, {'fits' if remedy.fits else 'still too much'}"
        for remedy in report.remedies
    ]
    if target.assumed:
        listing.append("  if it is to run on GPUs: --gpu-memory-gib or cluster.gpu_memory_gib")
    return "\n".join([head, *listing])


def _workers(number: int) -> str:
    return f"{number} worker{'s' if number > 1 else ''}"


def _figure(name: str, size: int) -> str:
    return f"  {name:42}{size / GIB:10.2f}"


def _gib(size: int) -> str:
    return f"{size / GIB:,.2f} GiB"
