"""The paper's experiments: their rows, what a row is at a scale, which runs it has, and what is counted of them."""

from __future__ import annotations

import functools
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sfa_dist.errors import UsageError
from sfa_dist.recipe.schema import Recipe, load_recipe
from sfa_dist.tools import cli, reproduce
from sfa_dist.tools.experiments import clips
from sfa_dist.tools.experiments.execution import rank_variables
from sfa_dist.tools.experiments.jobs import job_script
from sfa_dist.tools.experiments.pages import keep_earlier, plots_of, results_page, write_results
from sfa_dist.tools.experiments.results import Found, record_of, row_record
from sfa_dist.tools.experiments.rows import EXPERIMENTS, K400, SSV2, Paper, Row
from sfa_dist.tools.experiments.scales import SCALES, SHIPPED, ClipCounts, LeftOutError, Scale
from sfa_dist.tools.experiments.steps import Step, steps_of

ROOT = Path(__file__).resolve().parents[3]
TABLES = [
    (experiment, scale)
    for experiment in EXPERIMENTS.values()
    for scale in SCALES.values()
    if experiment.name != "fig3" or scale.name in ("demo", "kinetics400")  # It has 21 rows.
]
# Tables that have no row at a scale: those of other data sets, or of models that no recipe has.
NOTHING = {
    *(("table2", scale) for scale in ("kinetics600", "moments_in_time", "epic_kitchens100", "something_else")),
    *(("table5", scale) for scale in SCALES if scale.startswith(("something", "epic"))),
    *(("table6", scale) for scale in SCALES if scale.startswith(("kinetics", "moments"))),
    *((name, "moments_in_time") for name in ("table1", "fig3", "fig4", "cache")),
}
TABLE1 = {row.name: row.training for row in EXPERIMENTS["table1"].rows if row.training}
each = pytest.mark.parametrize(("experiment", "scale"), TABLES, ids=lambda value: value.name)


@functools.cache
def plan(experiment: str, scale: str, seeds: int = 1) -> tuple[reproduce.Plan, dict[str, str]]:
    return reproduce.plan_of(EXPERIMENTS[experiment], SCALES[scale], range(seeds), {})


def last_recipe(steps: tuple[Step, ...]) -> Recipe:
    return steps[-1].load({}).recipe


# ---------------------------------------------------------------------------------------------------- rows


@each
def test_every_row_is_a_recipe_or_says_why_it_is_none(experiment: Any, scale: Scale) -> None:
    """Its recipe loads, and has a test."""
    if (experiment.name, scale.name) in NOTHING:
        with pytest.raises(UsageError, match="none of the rows"):
            reproduce.plan_of(experiment, scale, range(1), {})
        return
    rows, left_out = reproduce.plan_of(experiment, scale, range(1), {})
    missing = [row.name for row in experiment.rows if row.name not in rows]
    assert missing == [row.name for row in experiment.rows if left_out.get(row.name)]
    for own in rows.values():
        recipe = last_recipe(own[0])
        assert recipe.stage1 is not None
        stage = recipe.stage2 or recipe.stage1
        assert stage.data.test or stage.data.val
        assert len({step.directory for step in own[0]}) == len(own[0])


# A second reading of the paper's text: (row, top-1, top-5, time).
PRINTED = """
-    64.45  87.48  1
I    27.75  56.73  0.5
II   25.80  53.07  0.5
III  38.77  68.93  0.53
IV   58.54  85.83  2.51
V    63.85  87.62  0.62
VI   64.13  87.35  1.37
"""


def test_table1_has_the_papers_numbers() -> None:
    read = [line.split() for line in PRINTED.split("\n") if line]
    rows = EXPERIMENTS["table1"].rows
    assert [row.name for row in rows] == [words[0] for words in read]
    assert [(row.paper.acc1, row.paper.acc5, row.paper.cost) for row in rows] == [
        tuple(map(float, words[1:])) for words in read
    ]


def test_tables_say_the_same_of_the_same_run() -> None:
    """Table 6 repeats Table 1's baseline and SFA, Table 2 SFA of Something-Something v2."""
    one = {row.name: row.paper for row in EXPERIMENTS["table1"].rows}
    baseline, ours = (row.paper for row in EXPERIMENTS["table6"].rows[:2])
    assert (baseline, ours) == (one["-"], one["V"])
    two = {row.name: row.paper for row in EXPERIMENTS["table2"].rows}["SSv2 -> SSv2"]
    assert (two.acc1, two.acc5) == (one["V"].acc1, one["V"].acc5)


def test_the_headers_of_recipes_give_the_same_numbers() -> None:
    """`# Paper:    Table 5, ViViT-L 128f on Kinetics-400: 82.59/93.09, ...`"""
    printed = {
        f"{row.paper.acc1:.2f}/{row.paper.acc5:.2f}"
        for name in ("table2", "table3", "table5", "table6")
        for row in EXPERIMENTS[name].rows
        if row.paper.acc5
    }
    found = set()
    for path in (ROOT / "recipes").rglob("*.yaml"):
        for line in path.read_text().splitlines():
            if line.startswith("#") and "Table" in line:
                found |= set(re.findall(r"\b\d\d\.\d\d/\d\d\.\d\d\b", line))
    assert printed <= found


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*_baseline.yaml")), ids=lambda path: path.stem)
def test_an_end_to_end_row_is_the_shipped_baseline(path: Path) -> None:
    data, size = path.parent.name, path.stem[0].upper()
    table = "table6" if data.startswith(("something", "epic")) else "table5"
    rows, _ = plan(table, data)
    (name,) = (
        row.name
        for row in EXPERIMENTS[table].rows
        if row.name == row.against and f"-{size} " in row.name and row.name in rows
    )
    ours, shipped = last_recipe(rows[name][0]), load_recipe(path).recipe
    assert ours.model_copy(update={"name": ""}) == shipped.model_copy(update={"name": ""})


def test_table1_at_the_demo_scale_is_what_the_paper_says_of_each_row() -> None:
    rows, left_out = plan("table1", "demo")
    assert set(left_out) == {"II", "IV"}
    recipes = {name: last_recipe(own[0]) for name, own in rows.items()}
    assert recipes["-"].stage2 is None
    assert {name: recipe.stage2.adapter is None for name, recipe in recipes.items() if recipe.stage2} == {
        "I": True,
        "III": False,
        "V": False,
        "VI": False,
    }
    assert [name for name, recipe in recipes.items() if recipe.stage2 and not recipe.stage2.freeze_trunk] == ["VI"]
    baseline = recipes["-"].stage1
    assert baseline is not None
    for recipe in filter(lambda recipe: recipe.stage2, recipes.values()):
        for block in ("frames", "optimizer", "schedule", "batch", "augment", "model"):
            assert getattr(recipe.stage2, block) == getattr(baseline, block), block
    first = {name: own[0][1].load({}).recipe.stage1 for name, own in rows.items() if len(own[0]) == 3}
    assert {name for name, stage in first.items() if stage and stage.schedule.epochs == 0} == {"I", "III"}


def test_the_cache_study_differs_in_stored_views_alone() -> None:
    rows, _ = plan("cache", "demo")
    recipes = {name: last_recipe(own[0]).stage2 for name, own in rows.items()}
    assert {name: stage.cache.views for name, stage in recipes.items() if stage and stage.cache} == {
        f"K = {views}": views for views in (1, 2, 4, 8)
    }
    live, baseline = recipes["live"], recipes["-"]
    assert baseline is None
    assert live is not None
    assert all(stage.model_copy(update={"cache": None}) == live for stage in recipes.values() if stage)
    assert {row.against for row in EXPERIMENTS["cache"].rows} == {"-"}
    # They start from one stage 1, which is that of Table 1's SFA.
    firsts = {path for name, paths in shared(rows, "stage1").items() for path in paths if name != "-"}
    assert firsts == shared(plan("table1", "demo")[0], "stage1")["V"]


def test_four_views_are_the_shipped_recipe() -> None:
    ours = last_recipe(plan("cache", K400)[0]["K = 4"][0])
    shipped = load_recipe("recipes/l_128f_cached.yaml").recipe
    assert ours.stage2 == shipped.stage2


def test_a_cached_row_of_a_recipe_that_mixes_clips_mixes_features() -> None:
    rows, _ = plan("cache", SSV2)
    cached, live = (last_recipe(rows[name][0]).stage2 for name in ("K = 1", "live"))
    assert cached is not None
    assert cached.cache is not None
    assert live is not None
    assert live.augment.mixup is not None
    assert (cached.augment.mixup, cached.cache.mixup) == (None, live.augment.mixup.alpha)


# ---------------------------------------------------------------------------------------------------- runs


def shared(rows: reproduce.Plan, stage: str) -> dict[str, set[Path]]:
    return {
        name: {step.directory for own in seeds.values() for step in own if step.stage == stage}
        for name, seeds in rows.items()
    }


def test_rows_share_equal_stages_and_no_others() -> None:
    rows, _ = plan("table1", "demo", seeds=2)
    images, firsts = shared(rows, "image"), shared(rows, "stage1")
    assert len(set.union(*images.values())) == 1  # One for all seeds.
    assert firsts["I"] == firsts["III"]
    assert firsts["V"] == firsts["VI"]
    assert not firsts["I"] & firsts["V"]
    assert firsts["-"] == set()
    assert len(firsts["V"]) == 2  # One for each seed.
    again, _ = plan("table1", "demo")
    assert shared(again, "stage1")["V"] < firsts["V"]


def test_tables_share_stages_too() -> None:
    one, four = plan("table1", "demo")[0], plan("fig4", "demo")[0]
    assert shared(one, "stage1")["V"] <= set.union(*shared(four, "stage1").values())


def test_table2_takes_stage1_of_the_other_set() -> None:
    rows, _ = plan("table2", "demo")
    firsts = {name: paths.pop() for name, paths in shared(rows, "stage1").items()}
    assert firsts["SSv2 -> K400"] == firsts["SSv2 -> SSv2"] != firsts["K400 -> K400"] == firsts["K400 -> SSv2"]
    tested = {name: last_recipe(own[0]).stage2.data.test[0].split("/")[1] for name, own in rows.items()}
    assert tested["SSv2 -> K400"] == tested["K400 -> K400"] == "reproduce_demo"
    assert tested["K400 -> SSv2"] == "reproduce_demo_other"
    assert SCALES["demo"].needs_other(EXPERIMENTS["table2"])
    assert not SCALES["demo"].needs_other(EXPERIMENTS["table1"])


def test_what_a_scale_lacks_is_left_out_by_name() -> None:
    _, left_out = plan("fig3", "demo")
    assert left_out["2f -> 64f"] == "2 frames are 1 here, which is no multiple of a tubelet's 2"
    assert left_out["32f -> 64f"] == "stage 1 would see 16 frames here, and stage 2 only 8"
    _, left_out = plan("table5", "kinetics400")
    assert left_out["ViViT-L 128f, kinetics600"] == "its data are kinetics600: --scale kinetics600"
    with pytest.raises(LeftOutError, match="no recipe of ViViT-g on kinetics600 is shipped"):
        SCALES["kinetics600"].resolve(EXPERIMENTS["table3"].rows[2].training)
    assert all((ROOT / recipe).is_file() for recipe in SHIPPED.values())


def test_scales_share_stages_too() -> None:
    """Stage 1 of Something-Something v2 is the same in its own scale and in Kinetics-400's table 2."""
    own, crossed = plan("table1", SSV2)[0], plan("table2", K400)[0]
    assert shared(own, "stage1")["V"] == shared(crossed, "stage1")["SSv2 -> K400"]
    demo, quick = plan("table1", "demo")[0], plan("table1", "quick")[0]
    assert not shared(demo, "image")["V"] & shared(quick, "image")["V"]


def test_a_shared_stage_is_named_after_what_determines_its_result() -> None:
    resolved = SCALES["demo"].resolve(TABLE1["V"])

    def directories(*sets: str, **environ: str) -> list[Path]:
        with_more = replace(resolved, sets=(*resolved.sets, *sets))
        return [step.directory for step in steps_of(with_more, 0, Path("run"), Path("shared"), environ)]

    as_it_is = directories()
    assert directories("data.workers=3", "log.every=1", "engine.precision=fp32", "test.spatial_views=3") == as_it_is
    assert directories("stage2.schedule.epochs=3") == as_it_is
    image, stage1, run = directories("stage1.optimizer.lr=0.5")
    assert (image, run) == (as_it_is[0], as_it_is[2])
    assert stage1 != as_it_is[1]
    # Other clips make another image checkpoint, and so another stage 1.
    assert not {*directories(SFA_DATA="/elsewhere")} & {*as_it_is[:2]}


def test_a_run_that_is_not_there_is_not_done(tmp_path: Path) -> None:
    """It is asked of a plan, where neither clips nor weights have to be there."""
    for stage in ("stage1", None):
        assert not Step(tmp_path, "recipes/demo.yaml", (), stage).is_done({})


def test_ranks_find_each_other() -> None:
    assert rank_variables(1) == [{}]
    ranks = rank_variables(3)
    assert [each["RANK"] for each in ranks] == [each["LOCAL_RANK"] for each in ranks] == ["0", "1", "2"]
    assert len({each["MASTER_PORT"] for each in ranks}) == 1


def test_jobs_wait_for_what_they_start_from(tmp_path: Path) -> None:
    rows, _ = plan("table1", "kinetics400")
    script = job_script([(name, steps) for name, own in rows.items() for steps in own.values()], "sfa it", {})
    calls = re.findall(r'^(job\d+)=\$\(submit "(\$job\d+)?" .*--run-dir (\S+)', script, re.MULTILINE)
    by_folder = {folder.split("/", 2)[2]: (job, wait) for job, wait, folder in calls}
    assert len(calls) == len(by_folder) == 5 + 2
    five, first = by_folder["table1_kinetics400/05_V/seed-0"], by_folder["table1_kinetics400/06_VI/seed-0"]
    assert five[1] == first[1] != ""
    assert by_folder["table1_kinetics400/00/seed-0"][1] == ""
    assert "Written by: sfa it" in script


# ---------------------------------------------------------------------------------------------------- results


def found(seed: int, acc1: float, stages: dict[str, float], test: float = 1.0) -> Found:
    return Found(seed, acc1, 1.0, 0.05, 400, stages, test, 100, Path(f"runs/{seed}"))


BASELINE = [found(0, 0.9, {"image": 20.0, "stage1": 100.0}), found(1, 0.94, {"image": 20.0, "stage1": 100.0})]
OURS = [
    found(0, 0.9, {"image": 20.0, "stage1": 20.0, "cache": 5.0, "stage2": 30.0}, test=4.0),
    found(1, 0.91, {"image": 20.0, "stage1": 20.0, "cache": 5.0, "stage2": 34.0}, test=4.0),
    found(2, 0.95, {"image": 20.0, "stage1": 20.0, "cache": 5.0, "stage2": 32.0}, test=4.0),
]
ROW = Row("V", "ours", Paper(63.85, 87.62, 0.62))


def test_means_intervals_and_costs() -> None:
    record = row_record(ROW, OURS, BASELINE)
    assert record["acc1_mean"] == pytest.approx(0.92)
    assert record["acc1_sd"] == pytest.approx(math.sqrt(0.0007))
    half = 4.3027 * math.sqrt(0.0007 / 3)  # Student's t with two degrees of freedom.
    assert record["acc1_interval"] == pytest.approx((0.92 - half, 0.92 + half))
    # Of the seeds that both have, 0 and 1: (55 + 59) / (100 + 100), and (79 + 83) / (121 + 121) with all counted.
    assert record["cost_ratio"] == pytest.approx(0.57)  # A cache runs stage 2's trunk: it is training.
    assert record["cost_ratio_everything"] == pytest.approx(162 / 242)
    assert record["seconds"] == pytest.approx(57.0)
    assert (record["seeds"], record["interval_over"]) == ([0, 1, 2], "seeds")


def test_one_seed_has_an_interval_over_clips_and_no_deviation() -> None:
    record = row_record(ROW, OURS[:1], [])
    assert (record["acc1_sd"], record["cost_ratio"], record["interval_over"]) == (None, None, "clips")
    low, high = record["acc1_interval"]
    assert 0.866 < low < 0.9 < high < 0.926


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_shown_with_what_is_missing_in_words(name: str, tmp_path: Path) -> None:
    experiment = EXPERIMENTS[name]
    first, *others = (row for row in experiment.rows if row.training)
    record = record_of(experiment, "demo", "sfa it", 1, {first.name: OURS}, {others[0].name: "why not"})
    assert not record["complete"]
    written = [] if name == "fig4" else write_results(record, experiment, tmp_path)  # Its curves are those of runs.
    assert json.loads(json.dumps(record))["rows"][0]["row"] == experiment.rows[0].name
    text = str(results_page(record))
    assert "not trained, why not" in text
    assert "guessing scores 5.00%" in text
    if written:
        assert [path.name for path in written] == [f"{name}.json", f"{name}.md", f"{name}.png"]
        assert f"![{experiment.title}]({name}.png)" in written[1].read_text()
    assert plots_of({**record, "rows": []}, experiment) == []


def test_results_that_are_no_longer_found_are_kept_aside(tmp_path: Path) -> None:
    """Those of runs that are elsewhere, or of another scale; what only gains seeds is written over."""
    experiment = EXPERIMENTS["table1"]

    def write(scale: str, **found: list[Found]) -> Path | None:
        kept = keep_earlier(experiment, scale, found, tmp_path)
        write_results(record_of(experiment, scale, "sfa it", 1, found, {}), experiment, tmp_path)
        return kept

    assert write("demo", V=OURS[:1]) is None
    assert write("demo", V=OURS, VI=OURS[:1]) is None
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert write("demo", V=OURS, VI=[]) == tmp_path / "earlier-1"
    assert {path.name: path.read_bytes() for path in (tmp_path / "earlier-1").iterdir()} == before
    assert write("quick", V=OURS) == tmp_path / "earlier-2"
    (tmp_path / "table1.json").write_text("{")
    assert write("quick", V=OURS) == tmp_path / "earlier-3"
    assert write("quick", V=[replace(each, acc1=each.acc1 / 2) for each in OURS]) == tmp_path / "earlier-4"


# ---------------------------------------------------------------------------------------------------- clips, command


def test_the_second_set_is_dark_on_light_and_moves_diagonally() -> None:
    label, frames = next(iter(clips.other_clips(1, True, 5, 4)))
    assert frames.shape == (4, 32, 32, 3)
    assert frames.mean() > 127
    assert re.fullmatch(r"[02468]or[13579]_down-right", label)
    first, second = (frame.max(axis=2) < 90 for frame in frames[:2])
    moves = [(down, right) for down in range(-2, 3) for right in range(-2, 3)]
    assert min(max(moves, key=lambda move: (np.roll(first, move, (0, 1)) & second).sum())) > 0


def test_clips_are_made_once(tmp_path: Path) -> None:
    made: list[ClipCounts] = []

    def make(folder: Path, counts: ClipCounts) -> None:
        folder.mkdir(exist_ok=True)
        made.append(counts)

    small, large = ClipCounts(1, 1, 1), ClipCounts(2, 1, 1)
    assert [clips.make_clips(tmp_path / "d", counts, make) for counts in (small, small, large)] == [True, False, True]
    assert made == [small, large]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["table9"], "no table9: there are table1, table2, table3, table4, table5, table6, fig1, fig3, fig4, cache"),
        (["table1", "--scale", "imagenet"], "--scale 'imagenet': there are demo, quick, kinetics400"),
        (["table1", "--seeds", "0"], "--seeds and --ranks have to be 1 or more"),
        (
            ["table2", "--scale", "kinetics600"],
            "none of the rows of table2 are there: its data are kinetics400: --scale",
        ),
        (["table4", "--scale", "demo"], "it takes no --scale"),
    ],
)
def test_a_wrong_command_line_says_what_is_known(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["reproduce", *words]) == 64
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
