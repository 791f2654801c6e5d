"""What is secret in a text is found, what is not is left, and both stay so."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe_files import MINIMAL, WriteRecipe, errors_of

from sfa_dist.boundary.secret import is_masked, is_secret_name, is_secret_variable, shown_source, without_secrets
from sfa_dist.data.shards.shard_names import expand_shards
from sfa_dist.errors import RecipeError
from sfa_dist.recipe.blocks import RemoteBlock
from sfa_dist.recipe.schema import load_recipe, print_recipe, record_recipe
from sfa_dist.run.record import refuse_other_inputs, stage_inputs
from sfa_dist.train import main

SECRET = "S3cr3tMark"
LEAKS = (
    *("https://user:{}@host/x.tar", "https://{}@host/x.tar", "https://user:a@{}@host/x.tar", "s3://k:{}@bucket/x.tar"),
    *("https://user:a/{}@host/x.tar", "https://user:a?{}@host/x.tar", "https://:{}@host:8080/x.tar"),
    *("https://host/x.tar?sig={}", "https://host/x.tar?a=1&X-Amz-Signature={}&b=2", "https://host/x.tar?{}"),
    *("https://host/{{0..3}}.tar?se=1&sig={}%3D", "https://host/x.tar#access_token={}", "s3://bucket/x?token={}"),
    *("rtsp://admin:{}@camera:554/live", "HTTPS://host/x.tar?SIG={}", "https://host/x.tar?sig={} with a space"),
    *(
        "pipe:curl -u me:{} https://host/x.tar",
        "pipe:curl --user 'me:{}' https://host/x.tar",
        "pipe:wget --password={} x",
    ),
    *("pipe:curl -H 'Authorization: Bearer {}' https://host/x", 'pipe:curl -H "X-Auth-Token: {}" https://host/x'),
    *(
        "pipe:AWS_SECRET_ACCESS_KEY={} aws s3 cp s3://b/x -",
        "pipe:azcopy cp 'https://h/x?sv=1&sig={}' -",
        "pipe:x --token {}",
    ),
    *("pipe:curl -b 'a={}' https://h/x", "pipe:SSHPASS={} sshpass -e ssh h", "pipe:curl --user 'a b:{}' https://h/x"),
    *("pipe:x --pass {}", "https://h/p.tar;jsessionid={}", "//me:{}@h/x.tar", "https:/me:{}@h/x.tar"),
    *("pipe:curl -b 'cookie: session={}' https://h/x", "pipe:PGPASSWORD='{} b' x", "pipe:x --secret-access-key {} y"),
    *("ClientError: 400 for url 'https://host/x.tar?sig={}'", "cannot read https://a:{}@host/x.tar: gone"),
    *('{{"storage_options": {{"secret": "{}"}}}}', "--set deepspeed={{api_key: {}}}", "password={}, user=me"),
)


@pytest.mark.parametrize("text", LEAKS)
def test_secrets_are_found(text: str) -> None:
    shown = shown_source(text.format(SECRET))
    assert SECRET not in shown
    assert "***" in shown
    assert shown_source(shown) == shown
    for word in ("host", "bucket", "camera", "x.tar"):
        assert (word in shown) or (word not in text)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "https://host:8080/a@b/x.tar",
            "s3://bucket/train-00?.tar",
            "s3://bucket/**/x#1.tar",
            "https://h/x.tar?versionId=3",
        ),
        *("data/train-{000000..000099}.tar", "pipe:cat a/b.tar", "pipe:gsutil cat gs://b/x.tar", "timm:vit_b16.augreg"),
        *("max_tokens=4, tokens: 5, tokenizer=x", "author: me", "a design: b", "signal: B:USR1@120", "path=/a/b"),
        *("error: a.yaml:5: data.train: expected a list", "123:456@789", "user@host.org", "-u", "https://h/?"),
    ],
)
def test_what_is_not_secret_stays(text: str) -> None:
    assert without_secrets(text) == shown_source(text) == text


@given(
    text=st.text(max_size=40)
    | st.lists(st.sampled_from(["https://", "a", ":", "@", "/", "?sig=", "&", " ", "***"])).map("".join)
)
@settings(max_examples=200, deadline=None)
def test_any_text_is_taken_and_masking_twice_is_masking_once(text: str) -> None:
    assert without_secrets(without_secrets(text)) == without_secrets(text)


@pytest.mark.parametrize(
    "name", ["password", "api_key", "deepspeed.x.token", "X-Amz-Signature", "sig", "AZURE_SAS", "auth"]
)
def test_names_of_secrets(name: str) -> None:
    assert is_secret_name(name)
    assert is_secret_variable(name)
    assert not is_secret_name(name.replace("sig", "design").replace("key", "keys_of").replace("auth", "author")) or (
        name not in ("sig", "auth")
    )


def test_no_key_of_a_recipe_is_a_secret(write_recipe: WriteRecipe) -> None:
    loaded = load_recipe(write_recipe(MINIMAL + "stage2: {frames: 8, cache: {views: 1}}\n"))
    assert not [key for key in loaded.origins if is_secret_name(key)]
    assert load_recipe(write_recipe(record_recipe(loaded.recipe), "again.yaml")).recipe == loaded.recipe


RECIPE = (
    MINIMAL
    + """\
data: {train: ["https://me:SECRET@h/${SFA_KEY}/x.tar?sig=SECRET"], remote: {allow: [https]}}
deepspeed: {comet: {api_key: SECRET}, x: [1, "https://h/?sig=SECRET"]}
"""
)


def test_a_recipe_is_recorded_and_printed_without_them(write_recipe: WriteRecipe) -> None:
    path = write_recipe(RECIPE.replace("SECRET", SECRET))
    loaded = load_recipe(
        path, [f"name=a{SECRET[0]}", f"data.val=['https://h/x?sig={SECRET}2']"], {"SFA_KEY": "PathKey123"}
    )
    for text in (record_recipe(loaded.recipe), print_recipe(loaded), without_secrets(f"PathKey123 or {SECRET}")):
        assert SECRET not in text
        assert "PathKey123" not in text
    assert "https://***@h/***/x.tar?sig=***" in record_recipe(loaded.recipe)
    assert loaded.recipe.stage1 is not None
    assert SECRET in loaded.recipe.stage1.data.train[0], "the run itself reads by it"


@pytest.mark.parametrize(
    "line",
    [
        "data: {train: 'https://me:S3cr3tMark@h/x?sig=S3cr3tMark'}",
        "engine: {api_key: S3cr3tMark}",
        "log: {every: 'password=S3cr3tMark'}",
    ],
)
def test_errors_of_a_recipe_do_not_tell(
    write_recipe: WriteRecipe, line: str, capsys: pytest.CaptureFixture[str]
) -> None:

    path = write_recipe(MINIMAL + line + "\n" + ("data: {}\n" if not line.startswith("data") else ""))
    assert errors_of(path)
    assert main(["--recipe", str(path), "--print-recipe", "--set", f"data.test=https://a:{SECRET}@h/x?{SECRET}"]) == 78
    said = capsys.readouterr()
    assert SECRET not in said.err + said.out


def test_another_signature_is_no_other_recipe(write_recipe: WriteRecipe) -> None:
    """Also for what a directory of before holds, which has them as they were."""
    paths = [write_recipe(RECIPE.replace("SECRET", f"{SECRET}{n}"), f"{n}.yaml") for n in (1, 2)]
    recipes = [load_recipe(path, ["name=a"], {"SFA_KEY": "x"}).recipe for path in paths]
    assert recipes[0] != recipes[1]
    assert record_recipe(recipes[0]) == record_recipe(recipes[1])
    assert recipes[0].stage1 is not None
    assert recipes[1].stage1 is not None
    old = {
        **stage_inputs(recipes[0], recipes[0].stage1, "a", ""),
        "starting weights (sha256)": f"https://h/w?sig={SECRET}1",
    }
    new = stage_inputs(recipes[1], recipes[1].stage1, "a", f"https://h/w?sig={SECRET}2")
    refuse_other_inputs("stage1", old, new)
    assert SECRET not in json.dumps(new)


@pytest.mark.parametrize(
    "source", ["https://***@h/x.tar", "https://h/x.tar?a=1&sig=***", "pipe:curl -u *** https://h/x"]
)
def test_what_a_run_directory_does_not_keep_is_asked_for(source: str) -> None:
    assert is_masked(source)
    with pytest.raises(RecipeError, match=r"does not keep: give the shards again, by --set .*--shards"):
        expand_shards([source], RemoteBlock(allow=["https", "pipe"], cache_dir="x"))


def test_stars_of_a_glob_are_no_mask() -> None:
    assert not any(map(is_masked, ("s3://b/**/x.tar", "s3://b/***/x.tar", "a/***.tar", "https://h/{0..9}.tar?v=1")))


@pytest.mark.parametrize(
    "text",
    [
        "{" + "a" * 300_000 + ",b}",
        "token" * 60_000,
        "--auth-" * 40_000,
        "eyJ-" * 75_000,
        "a.token " * 30_000,
        "http://" + ":" * 300_000,
        "http://" + "." * 300_000 + "x",
        "http://h/?" + "&" * 300_000,
        "//a:" * 75_000,
        "-b " * 100_000,
        "'\"" * 150_000,
    ],
    ids=lambda text: text[:12],
)
def test_a_text_without_end_takes_no_time(text: str) -> None:
    start = time.process_time()
    without_secrets(text)
    assert time.process_time() - start < 5
