"""An evaluation over 1, 2 and 3 ranks: each clip once, the same scores of each, and the file that keeps them."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_samples import video_bytes, write_shards
from ranks import run_ranks
from webdataset import TarWriter

from sfa_dist.data.batches.batch import Batch
from sfa_dist.data.batches.feed import FeedSettings, feed
from sfa_dist.data.batches.planned import LoaderSettings
from sfa_dist.data.batches.stream import eval_loader
from sfa_dist.data.shards.shard_index import SampleIndex, load_index
from sfa_dist.parallel.runtime import Runtime
from sfa_dist.parallel.stop_flag import StopFlag
from sfa_dist.recipe.blocks import AugmentBlock, BatchBlock, DataBlock
from sfa_dist.training import prediction_file as predictions
from sfa_dist.training.evaluation import Scoring, evaluate
from sfa_dist.training.prediction_file import PredictionFile

CLIPS = 13
HEADS = {"noun": 5, "verb": 3}
TEMPORAL, SPATIAL = 2, 3


def table(classes: int) -> torch.Tensor:
    """Logits of each clip, (clips, views, classes)."""
    shape = (CLIPS, TEMPORAL * SPATIAL, classes)
    return torch.randn(shape, generator=torch.Generator().manual_seed(classes))


def epic_shards(folder: Path, clips: int = CLIPS) -> list[Path]:
    """Two shards of clips with a noun and a verb, of which one is no video."""
    (folder / "manifest.json").write_text(
        json.dumps({"classes": None, "heads": {head: [f"{head}{n}" for n in range(k)] for head, k in HEADS.items()}})
    )
    paths = [folder / "a-000000.tar", folder / "a-000001.tar"]
    for path, numbers in zip(paths, (range(6), range(6, clips)), strict=True):
        with TarWriter(str(path), encoder=False, mtime=0) as writer:
            for number in numbers:
                facts = {"noun": number % HEADS["noun"], "verb": number % HEADS["verb"]}
                video = b"no video" if number == 4 else video_bytes(8)
                writer.write({"__key__": f"k{number:02d}", "mp4": video, "json": json.dumps(facts).encode()})
    return paths


def scored(
    runtime: Runtime, shards: list[Path], heads: dict[str, int], kind: str, folder: str, flush: int, logits: int
) -> Any:
    """On each rank: what it evaluated, and the result of all."""
    predictions.FLUSH_BATCHES, predictions.MAX_LOGITS = flush, logits
    index = load_index(shards)
    mine: list[int] = []
    bad: list[tuple[str, str]] = []
    logits_of = table(sum(heads.values()) or 7)

    def predict(batch: Batch) -> torch.Tensor:
        real = batch.ids[batch.weights > 0].tolist()
        mine.extend(real)
        assert batch.clips.shape[0] == len(batch.ids) * batch.views
        return logits_of[batch.ids.clamp(min=0)].flatten(0, 1)

    keep = PredictionFile(Path(folder) / str(runtime.world_size), "predictions", kind, index, heads, runtime)  # type: ignore[arg-type]
    sums = evaluate(
        predict,
        Scoring(heads),
        feed(batches(index, runtime.rank, runtime.world_size), FeedSettings("a rank")),
        runtime,
        StopFlag(),
        lambda found, clips: bad.extend(found),
        keep,
    )
    path = keep.finish({"views": np.array([TEMPORAL, SPATIAL]), "average": np.array("logits")})
    return mine, bad, sums, sums.result(), path


def batches(index: SampleIndex, rank: int, world_size: int) -> Any:
    data = DataBlock(stride=1, resize=16, decoder="pyav", workers=0)
    sizes = BatchBlock(size=8, micro=2)
    settings = LoaderSettings(data, sizes, AugmentBlock(), frames=4, crop=16, rank=rank, world_size=world_size)
    return eval_loader(index, settings, temporal_views=TEMPORAL, spatial_views=SPATIAL)


@pytest.fixture(scope="module")
def epic(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return epic_shards(tmp_path_factory.mktemp("epic"))


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_shards(tmp_path_factory.mktemp("single"), [5, 8])


def contents(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def test_ranks_score_each_clip_once_and_write_one_file(epic: list[Path], tmp_path: Path) -> None:
    index = load_index(epic)
    files = {}
    for world_size, flush in ((1, 3), (2, 1), (3, 16)):
        told = run_ranks(world_size, scored, epic, HEADS, "npz", str(tmp_path), flush, 4096)
        seen = [clip for mine, *_ in told for clip in mine]
        assert sorted(seen) == [n for n in range(CLIPS) if n != 4]
        assert len({repr(result) for *_, result, _ in told}) == 1  # All ranks know the result.
        assert [name for name, _ in told[0][1]] == ["a-000000.tar/k04"]
        files[world_size] = contents(told[0][4])
        assert [path.name for path in told[0][4].parent.iterdir()] == ["predictions.npz"]
        wanted = table(8).double().mean(1)
        _, _, sums, result, _ = told[0]
        assert result["samples"] == CLIPS - 1
        products = [np.outer(row[:5].softmax(0), row[5:].softmax(0)).reshape(-1) for row in wanted]
        right = [int(products[n].argmax()) == 3 * (n % 5) + n % 3 for n in range(CLIPS) if n != 4]
        assert result["action_acc1"] == sum(right) / len(right)
        assert sums.by_head["noun"].clips == sums.by_head["action"].clips == CLIPS - 1
    one = files[1]
    for other in files.values():
        assert other.keys() == one.keys()
        assert all((other[name] == one[name]).all() for name in one)
    assert one["keys"].tolist() == [f"k{n:02d}" for n in range(CLIPS) if n != 4]
    assert one["shards"].tolist() == ["a-000000.tar"] * 5 + ["a-000001.tar"] * 7
    assert one["labels"].tolist() == [[n % 5, n % 3] for n in range(CLIPS) if n != 4]
    assert one["logits"].dtype == np.float32
    assert (one["logits"] == np.delete(table(8).double().mean(1).float().numpy(), 4, axis=0)).all()
    assert (one["heads"].tolist(), one["head_sizes"].tolist()) == (["noun", "verb"], [5, 3])
    assert one["verb_classes"].tolist() == ["verb0", "verb1", "verb2"]
    assert (one["views"].tolist(), str(one["average"])) == ([2, 3], "logits")
    assert index.classes == {"noun": [f"noun{n}" for n in range(5)], "verb": ["verb0", "verb1", "verb2"]}


def test_one_label_a_clip(single: list[Path], tmp_path: Path) -> None:
    results = []
    for world_size in (1, 3):
        told = run_ranks(world_size, scored, single, {}, "npz", str(tmp_path), 2, 4096)
        results.append(told[0][3])
        arrays = contents(told[0][4])
        assert arrays["labels"].tolist() == [n % 3 for n in range(CLIPS)]
        assert (arrays["logits"] == table(7).double().mean(1).float().numpy()).all()
        assert (arrays["logits"].argmax(1) == arrays["labels"]).mean() == told[0][3]["acc1"]
    assert results[0] == pytest.approx(results[1], rel=1e-12)


def test_with_many_classes_the_best_of_each_head_are_kept(epic: list[Path], tmp_path: Path) -> None:
    [(*_, path)] = run_ranks(1, scored, epic, HEADS, "npz", str(tmp_path), 16, 7)
    arrays = contents(path)
    assert "logits" not in arrays
    scores = np.delete(table(8).double().mean(1).float().numpy(), 4, axis=0)
    assert (arrays["noun_top_classes"][:, 0] == scores[:, :5].argmax(1)).all()
    assert (arrays["verb_top_logits"] == np.sort(scores[:, 5:], axis=1)[:, ::-1]).all()


def test_the_file_holds_no_pickle_and_is_an_ordinary_npz(epic: list[Path], tmp_path: Path) -> None:
    [(*_, path)] = run_ranks(1, scored, epic, HEADS, "npz", str(tmp_path), 16, 4096)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    assert all(array.dtype != object for array in contents(path).values())


def test_parquet_has_the_same_rows(epic: list[Path], tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    [(*_, npz)] = run_ranks(1, scored, epic, HEADS, "npz", str(tmp_path), 16, 4096)
    told = run_ranks(2, scored, epic, HEADS, "parquet", str(tmp_path), 16, 4096)
    arrays, rows = contents(npz), parquet.read_table(told[0][4])
    assert rows.column("keys").to_pylist() == arrays["keys"].tolist()
    assert [rows.column(head).to_pylist() for head in HEADS] == arrays["labels"].T.tolist()
    assert rows.column("logits").to_pylist() == arrays["logits"].tolist()
    about = {key.decode(): json.loads(value) for key, value in rows.schema.metadata.items()}
    assert about["noun_classes"] == [f"noun{n}" for n in range(5)]
    assert (about["views"], about["average"]) == ([2, 3], "logits")
