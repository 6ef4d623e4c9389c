"""What `hermes4 complete` is told, by recipe and options, and what it says of its cost."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.counting_server import CountingServer
from completing import refused, words
from hermes_pipeline.config import find_recipe, load
from hermes_pipeline.sampling.recipe import Recipe
from running import Hermes4

pytestmark = pytest.mark.timeout(100)

RECORDS = 100
PRICES = ("--prompt-price", 1000, "--completion-price", 2000)


@pytest.fixture
def server() -> Iterator[CountingServer]:
    with CountingServer() as server:
        yield server


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(f'{{"prompt": "{i}?"}}\n' for i in range(RECORDS)))
    return path


def recipe_of(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def tokens_of(server: CountingServer) -> int:
    """What the answers cost, by the server's own account."""
    return sum(server.tokens[key] for key in server.answered)


# Recipes.


def test_the_recipe_of_the_project_says_every_setting_and_its_default() -> None:
    text = find_recipe("answers").read_text()
    assert load(Recipe, "answers") == Recipe()
    uncommented = re.sub(r"^# (\w+ = )", r"\1", text, flags=re.MULTILINE)
    keys = set(re.findall(r"^(\w+) = ", uncommented, flags=re.MULTILINE))
    sections = Recipe.__dataclass_fields__
    wanted = {key for name in sections for key in getattr(Recipe(), name).__dataclass_fields__}
    assert keys == wanted - {"logprobs"}  # which are not kept


def test_a_recipe_runs_and_options_stand_over_it(
    server: CountingServer, data: Path, tmp_path: Path, hermes4: Hermes4
) -> None:
    recipe = recipe_of(
        tmp_path / "my.toml",
        f"""
        [data]
        name = "{data}"
        limit = 3
        [model]
        endpoint = "{server.url}"
        name = "tiny"
        [sampling]
        top_k = 7
        stop = ["\\n"]
        extra = {{chat_template_kwargs = {{thinking = true}}}}
        [run]
        out = "{tmp_path / "out"}"
        draws = 9
        """,
    )
    ended = hermes4(
        *("complete", "--recipe", recipe, "--n", 2, "--set", "sampling.min_p=0.25"),
        *("--set", "requests.tries=2", "--temperature", 0.5),
    )
    assert ended.code == 0
    assert len(server.bodies) == 6
    body = server.bodies[0]
    assert (body["top_k"], body["min_p"], body["temperature"], body["top_p"]) == (
        7,
        0.25,
        0.5,
        0.95,
    )
    assert (body["stop"], body["chat_template_kwargs"]) == (["\n"], {"thinking": True})
    about = json.loads((tmp_path / "out" / "stage.json").read_text())
    assert about["recipe"]["run.draws"] == 2
    assert about["recipe"]["requests.tries"] == 2
    assert about["settings"]["top_k"] == 7


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("[samplng]", (), "unknown section [samplng]; did you mean 'sampling'?"),
        ("[sampling]\ntop_q = 1", (), "unknown key 'top_q' in [sampling]; did you mean 'top_p'?"),
        ("[sampling]\ntop_p = 2", (), "sampling.top_p is 2.0, but must be between 0 and 1"),
        ("[sampling]\nstop = [1]", (), "sampling.stop must be a string, got 1"),
        ("[sampling]\nextra = 1", (), "sampling.extra must be a table, got 1"),
        ("[run]\ndraws = 1.5", (), "run.draws must be an integer, got 1.5"),
        ("[run", (), "not valid TOML"),
        (
            "",
            ("--set", "requests.trys=1"),
            "unknown key 'trys' in [requests]; did you mean 'tries'",
        ),
        ("[sampling]\nextra = { n = 2 }", (), "[sampling] extra must not hold 'n': give run.draws"),
        ("[ray]\nworkers = 2", (), "[ray] workers wants address: give it, too, or leave workers"),
        ("", ("--max-cost", 3), "[prices] max_cost wants prices"),
        (
            "",
            ("--seed", 10**20),
            "run.seed is 100000000000000000000, which does not fit in 64 bits",
        ),
        ("", ("--set", f"sampling.extra={{big={10**20}}}"), "extra cannot be written as JSON"),
        ("", ("--set", "sampling.extra={day=1979-05-27}"), "extra cannot be written as JSON"),
        ("", (), "which conversations? give --data, or data.name in a recipe"),
        (
            "",
            ("--data", "x.jsonl"),
            "where shall the answers go? give --out, or run.out in a recipe",
        ),
    ],
)
def test_a_wrong_recipe_is_refused_in_one_line(
    tmp_path: Path, hermes4: Hermes4, text: str, options: Any, message: str
) -> None:
    recipe = recipe_of(tmp_path / "my.toml", text)
    assert message in refused(hermes4("complete", "--recipe", recipe, *options))


def test_an_option_that_names_a_model_ends_the_recipes_way(
    server: CountingServer, data: Path, tmp_path: Path, hermes4: Hermes4
) -> None:
    at = f'[model]\nendpoint = "{server.url}"\nname = "tiny"'
    recipe = recipe_of(tmp_path / "at.toml", at)
    given = ("complete", "--recipe", recipe, "--data", data, "--out", tmp_path / "out")
    said = refused(hermes4(*given, "--checkpoint", "nowhere"))
    assert "--checkpoint nowhere is not a folder" in said
    served = '[model]\ncheckpoint = "nowhere"\nmax_model_len = 99'
    recipe = recipe_of(tmp_path / "served.toml", served)
    given = ("complete", "--recipe", recipe, "--data", data, "--out", tmp_path / "out")
    assert hermes4(*given, "--endpoint", server.url, "--model", "tiny").code == 0


@pytest.mark.parametrize("command", ["complete", "evaluate"])
def test_log_probabilities_that_nobody_keeps_are_not_asked_for(
    server: CountingServer, data: Path, tmp_path: Path, hermes4: Hermes4, command: str
) -> None:
    asked = ("--data", data) if command == "complete" else ("--benchmark", "chain")
    given = (*asked, "--out", tmp_path / "out", "--endpoint", server.url, "--model", "tiny")
    said = refused(hermes4(command, *given, "--set", "sampling.logprobs=0"))
    assert "sampling.logprobs is 0, and this command keeps no log-probabilities; leave it" in said
    assert not server.bodies
    assert not (tmp_path / "out").exists()


def test_a_login_in_an_address_is_not_kept(
    server: CountingServer, data: Path, tmp_path: Path, hermes4: Hermes4
) -> None:
    url = server.url.replace("http://", "http://me:secret@")
    out = tmp_path / "out"
    words = ("complete", "--data", data, "--limit", 1, "--out", out, "--model", "tiny")
    assert hermes4(*words, "--endpoint", url).code == 0
    said = refused(hermes4(*words, "--endpoint", f"{server.url}?key=secret"))
    assert "a base URL holds a ? or #" in said
    assert all(b"secret" not in path.read_bytes() for path in out.iterdir())


def test_several_endpoints_share_the_requests(
    server: CountingServer, data: Path, tmp_path: Path, hermes4: Hermes4
) -> None:
    with CountingServer(delay_s=0.01) as other:
        server.delay_s = 0.01
        given = words(server, data, tmp_path / "out", "--endpoint", other.url)
        assert hermes4(*given).code == 0
        assert min(len(server.bodies), len(other.bodies)) > 100


def test_one_endpoint_of_several_that_knows_no_such_model_is_told_and_left_out(
    server: CountingServer, data: Path, tmp_path: Path, hermes4: Hermes4
) -> None:
    with CountingServer(lambda *_: 404) as other:
        ended = hermes4(*words(server, data, tmp_path / "out", "--endpoint", other.url))
    assert ended.out.startswith("100 read = 100 done + 0 set aside + 0 quarantined\n")
    told = f"complete: {other.url} (model tiny): 404: the test says 404; others are asked instead"
    assert ended.err.splitlines().count(told) == 1


# Cost.


def test_a_pilot_tells_what_the_rest_costs_and_pays_for_nothing_twice(
    server: CountingServer, data: Path, tmp_path: Path, hermes4: Hermes4
) -> None:
    out = tmp_path / "out"
    ended = hermes4(*words(server, data, out, "--n", 2, "--pilot", 20, *PRICES))
    assert (ended.code, ended.out) == (0, "")
    assert len(server.bodies) == 20
    asked = {body["messages"][0]["content"] for body in server.bodies}
    assert len(asked) == 20
    assert max(int(text[:-1]) for text in asked) > 50  # from all over the data
    told = re.search(
        r"180 draws to go: about 180 requests, 900 tokens of prompts, ([\d,]+) ± ([\d,]+) of "
        r"answers, ([\d.,]+) ± ([\d.,]+) in money$",
        ended.err.strip(),
    )
    assert told is not None, ended.err
    tokens, margin, money, _ = (float(number.replace(",", "")) for number in told.groups())
    before = tokens_of(server)
    assert hermes4(*words(server, data, out, "--n", 2, *PRICES)).code == 0
    assert server.answered.total() == len(server.answered) == 200
    spent = tokens_of(server) - before
    assert abs(spent - tokens) <= margin
    assert money == pytest.approx((900 * 1000 + tokens * 2000) / 1e6, abs=0.01)


def test_a_second_pilot_asks_nothing_and_tells_the_same(
    server: CountingServer, data: Path, tmp_path: Path, hermes4: Hermes4
) -> None:
    out = tmp_path / "out"
    told = [
        hermes4(
            *words(server, data, out, "--n", 2, "--pilot", 20, *PRICES, "--json")
        ).out.splitlines()[-1]
        for _ in range(2)
    ]
    assert told[0] == told[1]
    forecast = json.loads(told[0])["forecast"]
    assert (forecast["requests"], forecast["prompt_tokens"]) == (180, 900)
    assert len(server.bodies) == 20


def test_a_pilot_without_answers_is_a_users_error(
    server: CountingServer, data: Path, tmp_path: Path, hermes4: Hermes4
) -> None:
    server.decide = lambda *_: 400
    said = refused(hermes4(*words(server, data, tmp_path / "out", "--n", 2, "--pilot", 5)))
    assert "0 answers, of which a forecast wants two, most often: " in said


def test_the_money_ends_the_run_and_more_goes_on(
    server: CountingServer, data: Path, tmp_path: Path, hermes4: Hermes4
) -> None:
    out = tmp_path / "out"
    limited = words(server, data, out, "--n", 2, *PRICES, "--concurrency", 16, "--max-cost")
    said = refused(hermes4(*limited, 50))
    found = re.search(r"max_cost is reached: (\d+) answers have cost ([\d.]+) and are safe", said)
    assert found is not None
    assert int(found[1]) == server.answered.total() < 200
    spent = (5 * server.answered.total() * 1000 + tokens_of(server) * 2000) / 1e6
    assert float(found[2]) == pytest.approx(spent, abs=0.01)
    assert 48 < spent < 52
    assert "max_cost is reached" in refused(hermes4(*limited, 50))
    assert server.answered.total() == int(found[1])
    assert hermes4(*limited, 10_000).code == 0
    assert server.answered.total() == 200


def test_a_small_budget_lets_no_more_than_two_answers_pass(
    server: CountingServer, data: Path, tmp_path: Path, hermes4: Hermes4
) -> None:
    out = tmp_path / "out"
    given = words(server, data, out, *PRICES, "--concurrency", 64, "--max-cost", 0.001)
    assert "max_cost is reached: 2 answers" in refused(hermes4(*given))
    assert server.answered.total() == 2
    said = refused(hermes4(*given, "--pilot", 50))
    assert "max_cost is reached: 2 answers" in said
    assert server.answered.total() == 2


@pytest.mark.parametrize("counts", [set(), {"completion_tokens"}, {"prompt_tokens"}])
def test_prices_want_a_server_that_counts_all_tokens(
    server: CountingServer, data: Path, tmp_path: Path, hermes4: Hermes4, counts: set[str]
) -> None:
    server.counts = counts
    given = words(server, data, tmp_path / "out", *PRICES, "--max-cost", 1, "--concurrency", 4)
    assert "the server sends no counts of tokens; prices want them" in refused(hermes4(*given))
    assert len(server.bodies) <= 2


def test_a_server_that_counts_no_tokens_tells_no_cost(
    server: CountingServer, data: Path, tmp_path: Path, hermes4: Hermes4
) -> None:
    server.counts = set()
    out = tmp_path / "out"
    ended = hermes4(*words(server, data, out, "--pilot", 20))
    assert "the server counts no tokens, so nobody knows what they cost" in ended.err
    assert hermes4(*words(server, data, out)).code == 0


def test_fewer_draws_than_there_are_count_as_what_they_are(
    server: CountingServer, data: Path, tmp_path: Path, hermes4: Hermes4
) -> None:
    with data.open("a") as file:
        file.write("{broken\n" * 20)
    out = tmp_path / "out"
    hermes4(*words(server, data, out, "--n", 4, "--limit", 10))
    ended = hermes4(*words(server, data, out, "--n", 1))
    assert "110 draws to go: " in ended.err
    assert ended.err.strip().splitlines()[-1].startswith("complete: 100/100 draws, ")
    ended = hermes4(*words(server, data, out, "--n", 2))
    assert "90 draws to go: " in ended.err  # bad records are known by now
    assert ended.err.strip().splitlines()[-1].startswith("complete: 200/200 draws, ")


def test_progress_tells_the_cost_so_far_and_what_is_expected(
    server: CountingServer, data: Path, tmp_path: Path, hermes4: Hermes4
) -> None:
    ended = hermes4(*words(server, data, tmp_path / "out", "--n", 2, *PRICES))
    spent = (5 * 200 * 1000 + tokens_of(server) * 2000) / 1e6
    assert ended.err.strip().endswith(f", cost {spent:,.2f} of about {spent:,.2f}")
