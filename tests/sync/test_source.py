"""Sources of every layout: in the engines' buffers lies what quantising the whole tensors gives, bit for bit."""

from __future__ import annotations

import multiprocessing
import os
import queue
import stat
import subprocess
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from tests.support import patience, tiny_hf
from tests.support.plans import engine_plan
from tests.support.small_models import Tensors, shards, trained
from vime.checkpoint.hf import HFCheckpoint
from vime.errors import BadInput, VimeError
from vime.fp8 import quantise as fp8
from vime.models.config import ModelConfig
from vime.recipe.parallel import ParallelLayout
from vime.sync import segment
from vime.sync.buffers import entry_views
from vime.sync.digest import trainer_digests
from vime.sync.fingerprint import fingerprint
from vime.sync.parts import BUFFERS
from vime.sync.receivers import receivers_of
from vime.sync.schedule import Schedule, make_schedule
from vime.sync.segment import Segment, SegmentError, segment_name
from vime.sync.source import WeightSource

FP8 = tiny_hf.with_fp8(tiny_hf.DEEPSEEK, (16, 16))
CROSSING = tiny_hf.with_fp8(tiny_hf.DEEPSEEK, (40, 24))
UE8M0 = {**FP8, "quantization_config": {**FP8["quantization_config"], "scale_fmt": "ue8m0"}}
SKIPPING = {
    **FP8,
    "quantization_config": {
        **FP8["quantization_config"],
        "modules_to_not_convert": ["self_attn", "model.layers.1.mlp"],
    },
}
LAYOUTS = {
    "tp2-pp2-ep2": ParallelLayout(8, tp=2, pp=2, ep=2),
    "pp2-ep4": ParallelLayout(8, pp=2, ep=4, last_stage_layers=1),
    "tp4-etp2-ep2": ParallelLayout(8, tp=4, etp=2, ep=2),
    "ep8": ParallelLayout(8, ep=8),
    "tp2-pp4": ParallelLayout(8, tp=2, pp=4),
    "dp8": ParallelLayout(8),
}


class Case(NamedTuple):
    """A model and where its trainer's ranks are."""

    hf: dict[str, Any]
    layout: ParallelLayout
    per_node: int
    """Ranks a node."""
    shared: bool = False
    """Whether every rank shares a GPU with a worker of one engine."""


def expected(hf: dict[str, Any], tensors: Tensors, name: str, source: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A tensor of the stream and its scales, made from the whole weight."""
    config = ModelConfig.from_hf(hf)
    part = next(p for p in _parts(config) if p.name == source)
    if fp8.is_quantised(name, part.quantised, config.quantisation):
        assert config.quantisation is not None
        return fp8.quantise(tensors[source], config.quantisation.block, scale_format=config.quantisation.scale_format)
    return tensors[source].to(torch.float32 if name.endswith("correction_bias") else torch.bfloat16), None


def _parts(config: ModelConfig) -> list[Any]:
    from vime.models.families import params_of

    return [part for param in params_of(config) for part in param.parts]


def check_published(
    source: WeightSource, bucket: int, infos: dict[str, Any], hf: dict[str, Any], whole: Tensors
) -> int:
    """Compare everything that this rank published; how many tensors."""
    schedule, count = source.schedule, 0
    for number, info in infos.items():
        data = source._buffers.of(bucket, int(number)).data
        if info["segment"] is not None:
            data = torch.frombuffer(Segment.open(info["segment"]).memory, dtype=torch.uint8)
        slices, size = schedule.slices(bucket, int(number))
        assert info["size"] == size
        assert [entry[0] for entry in info["tensors"]] == [entry_slice.entry.name for entry_slice in slices]
        for entry_slice in slices:
            got, scales = entry_views(data, entry_slice, schedule.block)
            part = entry_slice.entry.param.parts[entry_slice.entry.part].name
            wanted, wanted_scales = expected(hf, whole, entry_slice.entry.name, part)
            assert got.dtype == wanted.dtype, entry_slice.entry.name
            assert torch.equal(got.view(torch.uint8), wanted.contiguous().view(torch.uint8)), entry_slice.entry.name
            if scales is None or wanted_scales is None:
                assert scales is wanted_scales
            else:
                assert torch.equal(scales, wanted_scales), entry_slice.entry.name
            count += 1
    return count


def check_digests(schedule: Schedule, rank: int, hf: dict[str, Any], whole: Tensors) -> None:
    """The tensors that ranks announce are made from the whole weights; every tensor falls to one rank."""
    mine = trainer_digests(schedule, rank, shards(hf, whole, schedule.layout, rank), None)
    found: list[Any] = [None] * schedule.layout.world_size
    dist.all_gather_object(found, mine)
    wanted = {
        entry.name: fingerprint(*expected(hf, whole, entry.name, entry.param.parts[entry.part].name))
        for bucket in schedule.buckets
        for entry in bucket.entries
    }
    assert {name: value for one in found for name, value in one.items()} == wanted
    assert sum(map(len, found)) == len(wanted)


def sync_case(rank: int, case: Case, run: str) -> None:
    """One rank's part of two syncs of a case, with receivers near and far."""
    hf, layout, per_node, shared = case
    config = ModelConfig.from_hf(hf)
    nodes = [place // per_node for place in range(layout.world_size)]
    far = nodes[-1] + 1
    engines = [
        engine_plan(0, {0: (0,), far: (0,)}, data=2, expert_parallel=config.moe is not None),
        engine_plan(1, {nodes[-1]: (0,)}),
    ]
    gpus = [place % per_node for place in range(layout.world_size)] if shared else None
    if shared:
        places = {node: tuple(range(per_node)) for node in sorted(set(nodes))}
        engines = [engine_plan(0, places, data=layout.world_size, expert_parallel=config.moe is not None)]
        engines.append(engine_plan(1, {far: (0, 1)}, data=2, expert_parallel=config.moe is not None))
    receivers = receivers_of(config, nodes, engines, gpus=gpus)
    schedule = make_schedule(config, layout, nodes, receivers, 60_000, draft=True, mtp_trained=True)
    for version in (1, 2):
        whole = trained(hf, version)
        check_digests(schedule, rank, hf, whole)
        source = WeightSource(shards(hf, whole, layout, rank), schedule, rank, run)
        assert source.prepare(version) == len(schedule.buckets)
        published = 0
        for bucket in range(len(schedule.buckets)):
            infos = source.publish(bucket)
            dist.barrier()
            published += check_published(source, bucket, infos, hf, whole)
            dist.barrier()
            source.release(bucket)
        source.finish()
        total = torch.tensor(published)
        dist.all_reduce(total)
        assert total == sum(
            len(schedule.slices(b.index, r)[0]) for b in schedule.buckets for r in range(len(schedule.receivers))
        )


def _rank(rank: int, world: int, store: str, work: Callable[..., None], arguments: list[Any], results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        for argument in arguments:
            work(rank, *argument)
        results.put((rank, None))
    except BaseException:
        results.put((rank, traceback.format_exc()))
        raise


def on_ranks(world: int, folder: Path, work: Callable[..., None], arguments: list[Any]) -> None:
    """Run `work(rank, *argument)` for every argument on `world` processes; the first failure is raised here."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vime.sync.source", "vime.fp8.cpu_kernels", "tests.support.small_models"])
    results = context.Queue()
    store = str(folder / "store")
    ranks = [
        context.Process(target=_rank, args=(rank, world, store, work, arguments, results), daemon=True)
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    try:
        for _ in ranks:
            rank, failure = results.get(timeout=patience.PROCESS)
            assert failure is None, f"rank {rank}: {failure}"
    except queue.Empty:
        pytest.fail("the ranks did not end within 120 s")
    finally:
        for process in ranks:
            process.join(patience.MOMENT)
            process.kill()


@pytest.mark.e2e
def test_every_layout_gives_what_quantising_the_whole_gives(tmp_path: Path) -> None:
    cases: list[Case] = [Case(FP8, layout, 4) for layout in LAYOUTS.values()]
    cases += [Case(CROSSING, LAYOUTS["tp2-pp2-ep2"], 2), Case(CROSSING, LAYOUTS["tp4-etp2-ep2"], 8)]
    cases += [Case(UE8M0, LAYOUTS["tp2-pp2-ep2"], 2), Case(SKIPPING, LAYOUTS["pp2-ep4"], 4)]
    cases += [Case(tiny_hf.QWEN3, ParallelLayout(8, tp=2), 2)]
    cases += [Case(tiny_hf.QWEN3, ParallelLayout(8, tp=2, pp=2, first_stage_layers=1), 2)]
    cases += [Case(tiny_hf.QWEN3_MOE, ParallelLayout(8, ep=4), 4)]
    # As on GPUs that trainer and engine share, but in the memory of CPUs.
    cases += [Case(FP8, LAYOUTS["tp2-pp2-ep2"], 4, True), Case(CROSSING, LAYOUTS["tp4-etp2-ep2"], 4, True)]
    on_ranks(8, tmp_path, sync_case, [(case, str(tmp_path)) for case in cases])
    assert not [
        path for path in segment.DIRECTORY.iterdir() if path.name.startswith(segment_name(str(tmp_path), 0, 0, 0)[:21])
    ]


def one_rank(
    hf: dict[str, Any],
    run: str,
    *,
    buffer: int = 100_000,
    tensors: Tensors | None = None,
    engine_node: int = 0,
    **more: Any,
) -> WeightSource:
    config = ModelConfig.from_hf(hf)
    schedule: Schedule = make_schedule(
        config, ParallelLayout(), [0], receivers_of(config, [0], [engine_plan(0, {engine_node: (0,)})]), buffer,
        draft=bool(more),
    )  # fmt: skip
    return WeightSource(tensors or shards(hf, trained(hf, 1), ParallelLayout(), 0), schedule, 0, run, **more)


def test_frozen_layers_come_from_the_checkpoint_as_they_are(tmp_path: Path) -> None:
    folder = tiny_hf.write_checkpoint(tmp_path / "hf", FP8, files=2)
    checkpoint = HFCheckpoint(folder)
    weights = trained(FP8, 3)
    held = shards(FP8, weights, ParallelLayout(), 0, mtp=False)
    source = one_rank(FP8, str(tmp_path), tensors=held, checkpoint=checkpoint)
    frozen = 0
    for bucket in range(source.prepare(1)):
        infos = source.publish(bucket)
        data = torch.frombuffer(Segment.open(infos["0"]["segment"]).memory, dtype=torch.uint8)
        for entry_slice in source.schedule.slices(bucket, 0)[0]:
            got, scales = entry_views(data, entry_slice, source.schedule.block)
            if entry_slice.entry.frozen:
                frozen += 1
                stored = checkpoint.stored(entry_slice.entry.name)
                assert torch.equal(got.view(torch.uint8), stored.view(torch.uint8))
                assert scales is None or torch.equal(scales, checkpoint.scale(entry_slice.entry.name))
            elif entry_slice.entry.name.endswith(("4.embed_tokens.weight", "shared_head.head.weight")):
                part = "model.embed_tokens.weight" if "embed" in entry_slice.entry.name else "lm_head.weight"
                assert torch.equal(got, weights[part].to(torch.bfloat16))
        source.release(bucket)
    source.finish()
    assert frozen > 20


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    held = shards(FP8, trained(FP8, 1), ParallelLayout(), 0)
    name = "decoder.layers.1.mlp.experts.local_experts.3.linear_fc1.weight"
    held[name][45, 3] = float("nan")
    source = one_rank(FP8, str(tmp_path), tensors=held)
    buckets = source.prepare(1)
    with pytest.raises(fp8.WeightNotFinite, match=r"model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight holds NaN"):
        [(source.publish(bucket), source.release(bucket)) for bucket in range(buckets)]
    source.finish()
    # The next sync starts anew.
    held[name][45, 3] = 0.0
    for bucket in range(source.prepare(2)):
        source.publish(bucket)
        source.release(bucket)
    source.finish()


def a_rank_with_a_weight_that_is_not_finite(rank: int, run: str) -> None:
    """Rank 3 of four has one; receivers on another node, so that messages cross."""
    config, layout = ModelConfig.from_hf(FP8), ParallelLayout(4, ep=4)
    receivers = receivers_of(config, [0, 0, 1, 1], [engine_plan(0, {0: (0,)})])
    schedule = make_schedule(config, layout, [0, 0, 1, 1], receivers, 1 << 30)
    held = shards(FP8, trained(FP8, 1), layout, rank)
    if rank == 3:
        name = next(name for name in held if "local_experts" in name)
        held[name][0, 0] = float("inf")
    source = WeightSource(held, schedule, rank, run)
    source.prepare(1)
    if rank == 3:
        with pytest.raises(fp8.WeightNotFinite, match=r"mlp\.experts\."):
            source.publish(0)
    else:
        source.publish(0)
    source.finish()


@pytest.mark.e2e
def test_no_rank_waits_for_one_whose_weight_is_not_finite(tmp_path: Path) -> None:
    on_ranks(4, tmp_path, a_rank_with_a_weight_that_is_not_finite, [(str(tmp_path),)])


def test_buckets_are_released_before_their_memory_is_used_again(tmp_path: Path) -> None:
    source = one_rank(FP8, str(tmp_path), buffer=20_000)
    source.prepare(1)
    source.publish(0)
    source.publish(1)
    with pytest.raises(VimeError, match="bucket 2 is published before bucket 0 was released"):
        source.publish(2)
    source.finish()


def test_segments_are_private_and_go_when_the_sync_ends(tmp_path: Path) -> None:
    source = one_rank(FP8, str(tmp_path))
    source.prepare(1)
    name = source.publish(0)["0"]["segment"]
    status = (segment.DIRECTORY / name).stat()
    assert stat.S_IMODE(status.st_mode) == 0o600
    source.finish()
    assert not (segment.DIRECTORY / name).exists()
    # What a killed run left is replaced.
    left = Segment.create(name, 10)
    source.prepare(2)
    assert len(Segment.open(name).memory) > len(left.memory)
    source.finish()


def test_buffers_for_another_node_have_no_name_and_stay_from_sync_to_sync(tmp_path: Path) -> None:
    """Making their pages takes longer than filling them."""
    source = one_rank(FP8, str(tmp_path), engine_node=1)

    def addresses() -> list[int]:
        return [source._buffers.of(number, 0).data.data_ptr() for number in range(BUFFERS)]

    source.prepare(1)
    first = [source._buffers.of(number, 0) for number in range(BUFFERS)]
    before = addresses()
    assert not (segment.DIRECTORY / segment_name(str(tmp_path), 0, 0, 0)).exists()
    source.finish()
    source.prepare(2)
    assert addresses() == before
    # A message that nobody took may still be read from them.
    stuck: Future[None] = Future()
    source._sending[0] = [stuck]
    source.finish()
    source.prepare(3)
    assert not set(addresses()) & {buffer.data.data_ptr() for buffer in first}
    source.finish()


def test_a_threads_priority_is_lowered_from_whatever_it_is() -> None:
    """Without rights a process cannot raise it, which a fixed value would be for one that is low already."""
    code = (
        "import os\nfrom concurrent.futures import ThreadPoolExecutor\nfrom vime.sync.source import _give_way\n"
        "os.nice(15)\nif os.geteuid() == 0: os.setuid(65534)\n"
        "with ThreadPoolExecutor(1, initializer=_give_way) as pool:\n"
        "    print(pool.submit(lambda: os.getpriority(os.PRIO_PROCESS, 0)).result())\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=patience.PROCESS)
    assert (found.returncode, found.stdout.strip()) == (0, "19"), found.stderr


def test_files_of_others_are_no_segments(tmp_path: Path) -> None:
    name = segment_name(str(tmp_path), 0, 0, 0)
    path = segment.DIRECTORY / name
    (tmp_path / "other").write_text("x" * 100)
    try:
        os.symlink(tmp_path / "other", path)
        with pytest.raises(SegmentError):
            Segment.open(name)
        with pytest.raises(SegmentError):
            Segment.create(name, 100)
        path.unlink()
        path.write_text("x" * 100)
        path.chmod(0o644)
        with pytest.raises(SegmentError, match="not a private file"):
            Segment.open(name)
    finally:
        path.unlink()
    for bad in ("../etc/passwd", "vime-x", name + "/..", "/etc/passwd"):
        with pytest.raises(SegmentError, match="is not the name of a weight segment"):
            Segment.open(bad)


def test_no_room_in_shared_memory_is_said_before_anything_is_written(tmp_path: Path) -> None:
    name = segment_name(str(tmp_path), 0, 0, 0)
    with pytest.raises(BadInput, match="smaller --update-weight-buffer-size"):
        Segment.create(name, 1 << 50)
    assert not (segment.DIRECTORY / name).exists()
