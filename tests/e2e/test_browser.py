"""In the browser: what a person sees and does, with headless Chromium on the pages of the real servers.

One tiny run serves all tests: a first run makes the data and the SFT model, a second one, started by the form of its
deployment, finds these and goes on to the champion. With RLHF_PICTURES=docs/pictures the pages are kept as pictures.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from infra import servers
from tasks import history, tracking
from tasks.config import SIX_SETS
from tests.api import ask, run_of

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'rlhf-flows[dev]'")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt install chromium)"),
]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync"]
WIDTH, HEIGHT = 1280, 900
SETTLES = 1500
"""Milliseconds until Prefect's graph of a run has moved into place."""
STEPS = [
    "SFT: train the policy",
    "reward model: train",
    "gold reward model: train",
    "PPO: train policy and critic",
    "evaluate: PPO against SFT",
    "register",
]


@pytest.fixture(scope="module")
def context() -> Iterator[Any]:
    """A browser of 1280 px; a page that a click opens in a new tab belongs to it too."""
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        made = browser.new_context(viewport={"width": WIDTH, "height": HEIGHT})
        made.set_default_timeout(30_000)
        yield made
        browser.close()


@pytest.fixture
def page(context: Any) -> Iterator[Any]:
    """A page on which no script may fail."""
    made, errors = context.new_page(), []
    made.on("pageerror", lambda error: errors.append(str(error)))
    yield made
    made.close()
    assert errors == []


@pytest.fixture(scope="module")
def keep() -> Callable[[Any, str], None]:
    """(page, name) -> its picture, if pictures are wanted."""
    folder = os.environ.get("RLHF_PICTURES")

    def keep(page: Any, name: str) -> None:
        page.wait_for_timeout(SETTLES)
        if folder:
            page.screenshot(path=Path(folder) / f"{name}.png")

    return keep


@pytest.fixture(scope="module")
def mlflow(folder: Path) -> Iterator[str]:
    """The address of an MLflow server, which the commands of the module track on."""
    store = f"sqlite:///{folder / 'server.db'}"
    with (
        servers.mlflow_server(store_uri=store, artifacts=folder / "artifacts", log=folder / "mlflow.log") as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("MLFLOW_TRACKING_URI", server.wait_ready())
        yield server.url


@pytest.fixture(scope="module")
def first(rlhf: Callable[..., Any], prefect_api: str, mlflow: str) -> str:
    """The id of a run that ended after SFT."""
    ended = rlhf("run", "--until", "sft", api=prefect_api).end()
    assert ended.code == 0, ended.output
    (run,) = _runs(prefect_api, "COMPLETED")
    return str(run["id"])


@pytest.fixture(scope="module")
def served(command: Callable[..., Any], folder: Path, prefect_api: str, mlflow: str) -> Iterator[Any]:
    """`rlhf serve`, whose candidates wait for a person."""
    manual = ("--set", "promote.approval=manual")
    serving = command("serve", str(folder / "tiny.yaml"), "--name", "nightly", *manual, api=prefect_api)
    serving.wait_for(lambda: ask(prefect_api, "deployments/filter", deployments={"name": {"any_": ["nightly"]}}))
    yield serving
    serving.process.terminate()
    assert serving.end().left == []


@pytest.fixture(scope="module")
def started(first: str, served: Any, context: Any, prefect_api: str, keep: Callable[..., None]) -> str:
    """The id of a run that was started by the form of its deployment, after the form had refused a bad parameter."""
    page = context.new_page()
    page.goto(_ui(prefect_api))
    page.get_by_role("link", name="Deployments").click()
    page.get_by_role("link", name="nightly").first.click()
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Custom").click()
    steps = page.get_by_label("Steps")  # PPO's
    steps.fill("-1")
    page.get_by_role("button", name="Submit").click()
    assert steps.evaluate("field => field.validationMessage") == "Value must be greater than or equal to 1."
    keep(page, "form")
    assert page.url.split("?")[0].endswith("/run")
    assert [run["id"] for run in _runs(prefect_api)] == [first]
    steps.fill("2")
    page.get_by_role("button", name="Submit").click()
    served.wait_for(lambda: len(_runs(prefect_api)) == 2, 60)
    page.close()
    (run,) = [run for run in _runs(prefect_api) if run["id"] != first]
    assert run["parameters"]["config"]["ppo"]["steps"] == 2
    return str(run["id"])


@pytest.fixture(scope="module")
def champion(started: str, served: Any, context: Any, prefect_api: str, keep: Callable[..., None]) -> str:
    """The id of that run once a person has approved its candidate in the form of its page."""
    served.wait_for(lambda: run_of(prefect_api, started)["state_name"] == "Suspended", 500)
    page = context.new_page()
    page.goto(_run_page(prefect_api, started))
    page.get_by_role("button", name="Open menu").click()
    page.get_by_role("menuitem", name="Resume").click()
    form = page.get_by_role("dialog")
    form.get_by_text("Shall tiny-policy version 1 become champion, the first?").wait_for()
    form.get_by_label("Decision").click()
    page.get_by_role("option", name="approve").click()
    form.get_by_label("Comment").fill("reads well")
    form.get_by_label("Name").fill("Ann")
    keep(page, "approval")
    form.get_by_role("button", name="Resume").click()
    served.wait_for(lambda: run_of(prefect_api, started)["state_type"] == "COMPLETED", 300)
    page.close()
    return started


def test_a_person_approves_in_the_form(champion: str, folder: Path) -> None:
    (move,) = history.moves(tracking.open_store(folder / "workspace"), "tiny-policy")
    assert (move.by, move.kind, move.after) == ("Ann", history.PROMOTION, 1)
    assert move.why.endswith("; Ann approved it (reads well).")


def test_the_run_page_shows_the_steps_in_order_with_their_artifacts(
    champion: str, page: Any, prefect_api: str, keep: Callable[..., None]
) -> None:
    page.goto(_run_page(prefect_api, champion))
    page.get_by_role("tab", name="Task Runs").click()
    page.get_by_text("6 Task runs").wait_for()
    listed = page.get_by_role("tabpanel")
    listed.get_by_text(STEPS[0]).wait_for()
    assert [line for line in listed.inner_text().splitlines() if line in STEPS] == STEPS[::-1]  # newest first
    keep(page, "run")
    page.get_by_role("tab", name="Artifacts").click()
    page.get_by_text("lineage-graph", exact=True).wait_for()
    text = page.get_by_role("tabpanel").inner_text().splitlines()
    assert {"steps", "metrics", "curves", "mlflow", "sft", "reward", "gold", "ppo", "evaluate"} <= set(text)


def test_by_clicks_alone_from_the_champions_run_to_what_it_was_made_from(
    champion: str, first: str, page: Any, prefect_api: str, mlflow: str, keep: Callable[..., None]
) -> None:
    page.goto(_run_page(prefect_api, champion))
    _open_artifact(page, "lineage", run_of(prefect_api, champion)["name"])
    page.get_by_text("What the policy was made from").wait_for()
    page.get_by_role("link", name="Prefect run").first.wait_for()
    keep(page, "lineage")
    text = page.locator("body").inner_text()
    assert all(re.search(rf"download \w{{16}} {name}@local · \d+ rows", text) for name in SIX_SETS)
    assert "random weights, heads 2, hidden_size 32, layers 1, positions 256, vocab_size 400" in text
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    if head.returncode == 0:  # else the tests run on a copy without git
        assert f"code {head.stdout[:10]}" in text
    sft = page.locator("li:has(> strong:text-is('sft'))").first  # found, not made, by the champion's run
    sft.get_by_role("link", name="Prefect run").first.click()
    page.wait_for_url(f"**/runs/flow-run/{first}*")
    _open_artifact(page, "sft", run_of(prefect_api, first)["name"])
    page.get_by_role("heading", name="sft", exact=True).wait_for()
    page.get_by_role("link", name="MLflow run").first.click()
    page.wait_for_url(f"{mlflow}/#/experiments/*/runs/*")
    page.get_by_text(run_of(prefect_api, first)["name"]).first.wait_for()


def test_the_page_of_a_cached_stage_leads_to_the_run_that_made_it(
    champion: str, first: str, page: Any, prefect_api: str
) -> None:
    page.goto(_run_page(prefect_api, champion))
    _open_artifact(page, "sft", run_of(prefect_api, champion)["name"])
    page.get_by_role("heading", name="sft (cached)").wait_for()
    page.get_by_role("link", name="Prefect run").first.click()
    page.wait_for_url(f"**/runs/flow-run/{first}*")
    page.get_by_text(run_of(prefect_api, first)["name"]).first.wait_for()


def test_mlflow_shows_versions_and_aliases(champion: str, page: Any, mlflow: str, keep: Callable[..., None]) -> None:
    page.goto(f"{mlflow}/#/models")
    news = page.get_by_role("dialog")  # MLflow's
    page.add_locator_handler(news, lambda: news.get_by_role("button", name="Close").click())
    page.get_by_role("link", name="tiny-policy", exact=True).click()
    version = page.get_by_role("row").filter(has=page.get_by_role("link", name="Version 1"))
    version.get_by_text("@ champion", exact=True).wait_for()
    assert version.get_by_text("@ candidate", exact=True).is_visible()
    keep(page, "mlflow")


def test_the_report_fits_its_page_and_prints(champion: str, folder: Path, page: Any, keep: Callable[..., None]) -> None:
    report = max((folder / "workspace" / "reports").glob("*.html"), key=lambda path: path.stat().st_mtime)
    page.goto(report.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= WIDTH
    pictures = page.evaluate("[...document.images].map(image => image.complete && image.naturalWidth)")
    assert pictures
    assert all(pictures)
    keep(page, "report")
    printed = page.pdf(format="A4", print_background=True)
    assert printed.startswith(b"%PDF-")
    assert len(re.findall(rb"/Type /Page\b", printed)) >= 2


def _ui(api: str) -> str:
    return api.removesuffix("/api")


def _run_page(api: str, run_id: str) -> str:
    return f"{_ui(api)}/v2/runs/flow-run/{run_id}"


def _runs(api: str, *states: str) -> list[dict[str, Any]]:
    """The runs of `retrain`, without its subflows."""
    wanted = {"state": {"type": {"any_": list(states)}}} if states else {}
    return ask(api, "flow_runs/filter", flow_runs=wanted, flows={"name": {"any_": ["retrain"]}})


def _open_artifact(page: Any, key: str, run_name: str) -> None:
    """By clicks: from a run's page to one of its artifacts."""
    page.wait_for_timeout(SETTLES)  # a graph that is left while it moves fails in Prefect's own code
    page.get_by_role("tab", name="Artifacts").click()
    page.get_by_text(key, exact=True).first.click()
    page.wait_for_url(f"**/artifacts/key/{key}")
    line = page.locator("div", has_text=f"Flow run: {run_name}").last
    line.locator("xpath=ancestor-or-self::*[.//a[contains(@href, '/artifacts/artifact/')]][1]").locator(
        "a[href*='/artifacts/artifact/']"
    ).first.click()
