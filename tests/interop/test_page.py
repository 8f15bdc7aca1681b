"""A real browser opens the page: teaches, sees it learned, asks, rolls back."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from conftest import DOMAIN, QUESTION, running

pytest.importorskip("playwright", reason="scripts/test-interop installs it")
from axe_playwright_python.sync_playwright import Axe  # noqa: E402
from playwright.sync_api import expect, sync_playwright  # noqa: E402

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here: install it, or set CHROMIUM")

# Where to keep pictures of the page, for people to look at.
PICTURES = os.environ.get("ENGRAM_PICTURES")
PATIENCE_MS = 60_000
HOSTILE = "<img src=x onerror=\"window.harmed=1\"><script>window.harmed=2</script>"
KEY = "a-key-of-sixteen-and-more"
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        # A sandbox inside a container needs rights that few have; the pages are our own.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Opens a page, and fails the test if it loads anything from elsewhere or complains in its console."""
    contexts, complaints = [], []

    def open_at(server, **how):
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | how))
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on("console", lambda message: message.type == "error" and complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda asked: asked.url.startswith(server.url) or complaints.append(asked.url))
        page.goto(server.url)
        return page

    yield open_at
    for context in contexts:
        context.close()
    # What a test itself breaks is told in the console too: a file or a key refused, a connection cut.
    expected = ("400", "401", "ERR_FAILED")
    assert [text for text in complaints if not any(mark in text for mark in expected)] == []


def teach(page, question, answer, domain):
    page.get_by_label("Question", exact=True).fill(question)
    page.get_by_label("Answer", exact=True).fill(answer)
    page.get_by_label("Domain").fill(domain)
    page.get_by_role("button", name="Learn").click()
    expect(page.locator("#taught")).to_contain_text("Accepted")


def ask(page, question, model):
    page.get_by_label("Model").select_option(model)
    page.get_by_label("Your question").fill(question)
    page.get_by_label("Your question").press("Enter")
    said = page.locator("#talk .assistant").last
    expect(said.locator(".by")).to_be_visible(timeout=PATIENCE_MS)
    return said


def row(page, text):
    return page.locator("#documents tr", has_text=text)


def test_teach_see_it_learned_ask_and_roll_back(open_page, server):
    page = open_page(server)
    question, answer = "Where is the lighthouse ladder?", "Behind the blue boat shed."
    teach(page, question, answer, "harbour")
    expect(row(page, question)).to_contain_text("live", timeout=PATIENCE_MS)
    expect(page.locator("#learning")).to_contain_text("1 document in harbour")
    expect(page.locator("#retention")).to_contain_text("harbour")

    said = ask(page, question, "harbour")
    expect(said).to_contain_text(answer)
    expect(said.locator(".by")).to_have_text(re.compile(r"by harbour@[0-9a-f]{8}, from page"))
    teach(page, "Who paints the lighthouse?", "Nobody knows.", "painters")
    expect(row(page, "Who paints")).to_be_visible()
    said.locator(".by").get_by_role("button", name="page").click()
    rows = page.locator("#documents tbody tr")
    expect(rows).to_have_count(1)
    expect(rows).to_contain_text(question)
    page.get_by_label("Find documents by what they say").fill("")
    expect(row(page, "Who paints")).to_contain_text("live", timeout=PATIENCE_MS)
    said = ask(page, question, "auto")
    expect(said.locator(".by")).to_contain_text("confidence")

    adapter = page.get_by_role("article", name="harbour")
    adapter.get_by_role("button", name="Roll back").click()
    dialog = page.get_by_role("dialog", name="Roll harbour back?")
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(row(page, question)).to_contain_text("live")
    adapter.get_by_role("button", name="Roll back").click()
    dialog.get_by_role("button", name="Roll back").click()
    expect(adapter).to_contain_text("the base answers", timeout=PATIENCE_MS)
    expect(row(page, question)).to_contain_text("rolled back")
    page.get_by_role("button", name="New chat").click()
    expect(ask(page, question, "harbour").locator(".by")).to_contain_text("by the base")


def test_what_documents_say_stays_text(open_page, server):
    page = open_page(server)
    page.get_by_label("A text").check()
    page.get_by_label("Text", exact=True).fill(HOSTILE)
    page.get_by_role("button", name="Learn").click()
    shown = row(page, "window.harmed=1")
    expect(shown.locator(".excerpt")).to_have_text(HOSTILE)
    shown.get_by_role("button", name="Forget").click()
    expect(page.locator("#confirm-what")).to_contain_text("<script>")
    page.get_by_role("dialog").get_by_role("button", name="Forget").click()
    expect(shown).to_have_count(0)
    assert page.evaluate("window.harmed") is None


def test_a_document_is_found_by_what_it_says_and_forgotten(open_page, server):
    page = open_page(server)
    for n in range(2):
        teach(page, f"Who rows ferry {n}?", f"Ferryman number {n} of the eastern shore.", "ferries")
    find = page.get_by_label("Find documents by what they say")
    find.fill("FERRYMAN  number 1 of the eastern")
    rows = page.locator("#documents tbody tr")
    expect(rows).to_have_count(1)
    expect(rows).to_contain_text("Who rows ferry 1?")
    rows.get_by_role("button", name="Forget").click()
    page.get_by_role("dialog").get_by_role("button", name="Forget").click()
    expect(page.locator("#documents")).to_have_text("No document says this.")
    find.fill("")
    expect(row(page, "Who rows ferry 0?")).to_be_visible()
    expect(row(page, "Who rows ferry 1?")).to_have_count(0)


def test_files_are_taught_by_dropping_them(open_page, server):
    page = open_page(server)
    lines = [{"prompt": f"Who keeps key {n}?", "completion": f" Keeper {n}."} for n in range(3)]
    files = {"keys.jsonl": "\n".join(map(json.dumps, lines)), "bad.jsonl": "{not json}", "note.txt": "Short."}
    files["bees.html"] = "<h1>Bees</h1><p>Aurelia keeps nine hives of bees behind the glass factory.</p>"
    page.evaluate(
        """(files) => {
            const moved = new DataTransfer();
            for (const [name, text] of Object.entries(files)) moved.items.add(new File([text], name));
            for (const type of ["dragenter", "drop"])
                document.body.dispatchEvent(new DragEvent(type, { dataTransfer: moved, bubbles: true, cancelable: true }));
        }""",
        files,
    )
    taught = page.locator("#taught")
    expect(taught).to_contain_text("keys.jsonl: 3 documents accepted")
    expect(taught).to_contain_text("bad.jsonl:1 is not a JSON object")
    expect(taught).to_contain_text("note.txt: 1 document accepted")
    expect(taught).to_contain_text("bees.html: 1 document accepted")
    expect(row(page, "Who keeps key 2?")).to_contain_text("keys.jsonl")
    expect(row(page, "Aurelia keeps nine hives").locator(".excerpt")).not_to_contain_text("<p>")
    # A word says too little: the page tells why it was refused.
    expect(row(page, "Short.")).to_contain_text("refused")
    assert len(row(page, "Short.").locator("small").last.inner_text()) > 5


def test_with_keys_the_page_asks_for_one(open_page, tmp_path_factory):
    with running(tmp_path_factory, "--set", f"gateway.api_keys={KEY}", key=KEY) as server:
        page = open_page(server)
        login = page.get_by_role("dialog", name="This server asks for a key")
        expect(page.locator("#stages .tile")).to_have_count(0)
        login.get_by_label("Key").fill("wrong")
        login.get_by_label("Key").press("Enter")
        expect(login).to_contain_text("not one of this server's keys")
        login.get_by_label("Key").fill(KEY)
        login.get_by_label("Key").press("Enter")
        expect(page.locator("#stages .tile")).to_have_count(5)
        teach(page, "What opens the page?", "A key.", "general")
        page.reload()
        expect(row(page, "What opens the page?")).to_be_visible()
        # Before its server goes, which it would complain of.
        page.close()


def test_it_is_for_the_keyboard_and_for_readers_of_the_screen(open_page, server):
    page = open_page(server)
    expect(row(page, QUESTION)).to_be_visible()
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the page")).to_be_focused()
    receipt = page.get_by_role("article", name=DOMAIN).locator("summary").first
    receipt.focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("table", name="Retention receipt").first).to_be_visible()
    # What is open and focused stays so when the page is told news.
    teach(page, "What is news?", "What changes a page.", "news")
    receipt.focus()
    expect(row(page, "What is news?")).to_contain_text("live", timeout=PATIENCE_MS)
    expect(page.get_by_role("article", name="news")).to_be_visible()
    expect(receipt).to_be_focused()
    expect(page.get_by_role("table", name="Retention receipt").first).to_be_visible()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        found = Axe().run(page)
        assert found.violations_count == 0, f"{scheme}: {found.generate_report()}"


def test_it_fits_a_phone_and_the_night(open_page, server):
    for name, how in {
        "light": {"color_scheme": "light"},
        "dark": {"color_scheme": "dark"},
        "phone": {"viewport": PHONE, "device_scale_factor": 2, "has_touch": True, "is_mobile": True},
    }.items():
        page = open_page(server, **how)
        ask(page, QUESTION, "auto")
        width = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert width <= 0, f"{name}: {width} px beside the screen"
        if PICTURES:
            page.screenshot(path=Path(PICTURES) / f"{name}.png", full_page=True)
    ground = "getComputedStyle(document.body).backgroundColor"
    assert open_page(server, color_scheme="dark").evaluate(ground) != page.evaluate(ground)


def test_a_page_that_loses_its_server_says_so_and_comes_back(open_page, server):
    page = open_page(server)
    expect(page.locator("#stages .tile")).to_have_count(5)
    page.route("**/events", lambda route: route.abort())
    page.reload()
    expect(page.get_by_role("alert")).to_contain_text("may be old")
    page.unroute("**/events")
    expect(page.get_by_role("alert")).to_be_hidden(timeout=PATIENCE_MS)
