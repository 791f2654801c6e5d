"""Passwords and signatures by which a run reads its shards are in no file that it leaves and in no message."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import sfa, train
from shard_servers import file_server
from tiny_runs import SHORT, START, events, make_workplace, sets

from sfa_dist.data.shards.shard_index import build_index

PASSWORD, SIGNATURE, ROTATED, TOKEN = "Pa55w0rdMark", "S1gnatureMark", "R0tatedMark", "T0kenMark"
ONE_STAGE = SHORT.replace("stage2: {frames: 8, chunk_frames: 4}\n", "").replace('wandb: "off"', "wandb: auto")


@pytest.mark.slow
def test_a_run_leaves_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    place = make_workplace(tmp_path, ONE_STAGE)
    build_index(sorted((place / "train").glob("*.tar")))
    environ = {"HOME": "/nowhere", "SHARD_TOKEN": TOKEN, "WANDB_MODE": "offline"}
    with file_server(place) as server:
        url = f"http://me:{PASSWORD}@{server.url.removeprefix('http://')}"

        def options(signature: str) -> list[str]:
            return sets(
                f"data.train=['{url}/train/part-00000{{0..1}}.tar?sig={signature}']",
                "data.val=['pipe:MINE=${SHARD_TOKEN} cat val/part-00000{0..1}.tar']",
                f"data.remote={json.dumps({'allow': ['http', 'pipe'], 'cache_dir': 'cache'})}",
                "data.max_bad_fraction=1.0",
            )

        first = train(place, *START, "run", *options(SIGNATURE), **environ)
        assert first.code == 0, first.err
        again = train(place, *START, "run", *options(ROTATED), **environ)
        assert again.code == 0, again.err
        assert "done before, skipped" in again.out
        kept = sfa(place, "evaluate", "run", **environ)
        given = sfa(place, "evaluate", "run", "--shards", f"{url}/val/part-00000{{0..1}}.tar?sig={ROTATED}", **environ)
        server.faults = [403] * 20
        refused = train(place, *START, "run", *options(ROTATED), "--debug", **environ)
    assert kept.code == 78
    assert "a run directory does not keep: give the shards again" in kept.err
    assert given.code == 0, given.err
    assert refused.code == 65
    assert sfa(place, "report", "run").code == 0
    files = [path for folder in ("run", "cache", "outputs") for path in (place / folder).rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"recipe.yaml", "report.html", "log.jsonl", "console.log", "env.json", "attempts.json", "done.json"} <= names
    assert {"index.json", "result.json", "debug.log"} <= names
    assert any(name.endswith(".wandb") for name in names)
    for path in files:
        data = path.read_bytes()
        found = [secret for secret in (PASSWORD, SIGNATURE, ROTATED, TOKEN) if secret.encode() in data]
        assert not found, f"{path} holds {found}"
    assert "127.0.0.1" in (place / "run" / "recipe.yaml").read_text()
    assert events(place / "run", "start")
