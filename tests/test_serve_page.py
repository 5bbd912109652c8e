"""The chat page in a real Chromium: files in, tokens counted, answers streamed, stopped, drawn and sought."""

import base64
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from media_files import encoded, gradient, numbered_frame, pdf, write_video
from qvl.serve.run import Server
from serve_doubles import address, running

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium"),
]
CHAT = "**/v1/chat/completions"


@pytest.fixture(scope="module")
def server(tiny_folder: Path) -> Iterator[Server]:
    with running(tiny_folder, memory_gib=0.1) as server:
        yield server


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    (folder / "wide.png").write_bytes(encoded(gradient(200, 300), "PNG"))
    (folder / "two.pdf").write_bytes(pdf([(100, 100), (100, 200)]))
    (folder / "broken.png").write_bytes(b"no picture")
    write_video(folder / "clip.webm", [numbered_frame(i) for i in range(40)], fps="10", codec="libvpx")
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    """A fresh page; nothing in it may err or be held back by its own policy."""
    context = browser.new_context(viewport={"width": 1100, "height": 820}, color_scheme="light")
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "console", lambda m: wrong.append(m.text) if m.type == "error" and not re.search("400|429", m.text) else None
    )
    page.on(
        "request", lambda r: wrong.append(r.url) if not r.url.startswith((address(server), "data:", "blob:")) else None
    )
    page.goto(address(server))
    page.wait_for_selector("#model option", state="attached")
    yield page
    context.close()
    assert wrong == []


def add(page: Any, *names: Path) -> None:
    page.set_input_files("#files", [str(name) for name in names])
    page.wait_for_selector(".chip .facts span:has-text('token')")


def say(page: Any, words: str) -> None:
    before = page.locator(".turn.assistant .deeds").count()
    page.fill("#text", words)
    page.keyboard.press("Enter")
    page.locator(".turn.assistant .deeds").nth(before).wait_for(timeout=60_000)


def staged(page: Any, *deltas: dict[str, Any], finish: str = "stop") -> list[dict[str, Any]]:
    """The next replies are these; returns the list in which the requests appear."""
    asked: list[dict[str, Any]] = []

    def reply(route: Any) -> None:
        asked.append(json.loads(route.request.post_data))
        chunks = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
        chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
        lines = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)
        route.fulfill(status=200, content_type="text/event-stream", body=lines + "data: [DONE]\n\n")

    page.route(CHAT, reply)
    return asked


def test_a_picture_and_a_question_are_answered(page: Any, files: Path) -> None:
    add(page, files / "wide.png")
    assert "54 tokens, 300\u00d7200" in page.locator(".chip .facts").inner_text()
    say(page, "What?")
    assert page.locator(".turn.assistant .words").inner_text().strip()
    assert "8 tokens" in page.locator(".foot").inner_text()
    assert page.locator(".problem").count() == 0
    assert "so far" in page.locator("#count").inner_text()


def test_files_keep_the_order_shown_and_can_be_moved(page: Any, files: Path) -> None:
    asked = staged(page, {"content": "Yes."})
    add(page, files / "wide.png")
    page.set_input_files("#files", [str(files / "two.pdf"), str(files / "clip.webm")])
    page.wait_for_selector(".chip:nth-child(3) .facts span:has-text('token')")
    page.wait_for_selector(".chip:nth-child(2) .facts span:has-text('2 pages')")
    page.click(".chip:nth-child(1) [aria-label='Move wide.png back']")
    say(page, "And?")
    assert [part["type"] for part in asked[0]["messages"][0]["content"]] == ["file", "image_url", "video_url", "text"]
    assert (
        base64.b64decode(asked[0]["messages"][0]["content"][1]["image_url"]["url"].split(",")[1])
        == (files / "wide.png").read_bytes()
    )


def test_files_come_by_drop_and_by_paste(page: Any, files: Path) -> None:
    bring = """(event, [kind, data]) => {
        const transfer = new DataTransfer();
        transfer.items.add(new File([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))], "x.png", { type: "image/png" }));
        const made = kind === "paste" ? new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true, cancelable: true })
            : new DragEvent(kind, { dataTransfer: transfer, bubbles: true, cancelable: true });
        document.body.dispatchEvent(made);
    }"""
    data = base64.b64encode((files / "wide.png").read_bytes()).decode()
    for kind in ("dragenter", "drop", "paste"):
        page.locator("body").evaluate(bring, [kind, data])
        if kind == "dragenter":
            assert page.locator("#drop").is_visible()
    page.wait_for_selector(".chip:nth-child(2) .facts span:has-text('token')")
    assert not page.locator("#drop").is_visible()


def test_a_broken_file_says_so_before_it_is_sent(page: Any, files: Path) -> None:
    page.set_input_files("#files", [str(files / "broken.png")])
    page.wait_for_selector(".chip .problem")
    page.click("#send")
    assert "broken.png" in page.locator("[role=alert]").inner_text()


def test_boxes_and_points_are_drawn_on_the_picture(page: Any, files: Path) -> None:
    grounding = {
        "size": [300, 200],
        "pixels": [{"bbox_2d": [30, 20, 150, 100], "label": "cat"}, {"point_2d": [200, 150], "label": "dog"}],
    }
    asked = staged(page, {"content": "Here."}, {"grounding": grounding})
    add(page, files / "wide.png")
    say(page, "Where?")
    assert asked[0]["grounding"] == {"format": "pixels"}
    page.wait_for_selector("figure.places rect", state="attached")
    shown = page.locator("figure.places img").evaluate("(e) => [e.clientWidth, e.clientHeight]")
    assert shown == [300, 200]
    rect = page.locator("figure.places rect").last
    assert [float(rect.get_attribute(name)) for name in ("x", "y", "width", "height")] == [30, 20, 120, 80]
    assert page.locator("figure.places text").all_text_contents() == ["cat", "dog"]


def test_a_time_in_the_answer_seeks_the_video(page: Any, files: Path) -> None:
    staged(page, {"content": "It appears at <2.5 seconds> and leaves at 0:03."})
    add(page, files / "clip.webm")
    say(page, "When?")
    assert page.locator(".seek").all_inner_texts() == ["<2.5 seconds>", "0:03"]
    video = page.locator(".media video")
    for number, second in ((0, 2.5), (1, 3.0)):
        page.locator(".seek").nth(number).click()
        assert video.evaluate("(e) => e.currentTime") == second


def test_a_thought_is_folded_and_code_is_code(page: Any) -> None:
    staged(page, {"reasoning_content": "Hm, 2 + 2."}, {"content": "It is `4`:\n```python\n<b>2 + 2</b>\n```\ndone"})
    say(page, "2 + 2?")
    assert page.locator("details.thought").get_attribute("open") is None
    assert "Thought for" in page.locator("summary").inner_text()
    assert page.locator(".words pre").inner_text() == "<b>2 + 2</b>"  # text, never markup
    assert page.locator(".words code").inner_text() == "4"


def test_stop_ends_the_answer_and_the_next_one_works(page: Any, server: Server) -> None:
    page.click("#settings")
    page.fill("#o-max_tokens", "4000")
    page.click("#close")
    page.fill("#text", "Tell a long story.")
    page.keyboard.press("Enter")
    page.wait_for_selector("#send:has-text('Stop')")
    page.keyboard.press("Escape")
    page.wait_for_selector(".foot:has-text('stopped')")
    engine = next(iter(server.thread.engines.values()))
    for _ in range(200):
        if not engine.has_work:
            break
        page.wait_for_timeout(50)
    assert not engine.has_work
    page.click("#settings")
    page.fill("#o-max_tokens", "3")
    page.click("#close")
    say(page, "Short.")
    assert "3 tokens" in page.locator(".foot").last.inner_text()


def test_a_new_talk_while_an_answer_comes_begins_empty(page: Any) -> None:
    page.click("#settings")
    page.fill("#o-max_tokens", "4000")
    page.click("#close")
    page.fill("#text", "Tell a long story.")
    page.keyboard.press("Enter")
    page.wait_for_selector("#send:has-text('Stop')")
    page.wait_for_function("() => document.querySelector('.turn.assistant .words').textContent")
    page.click("#new")
    page.wait_for_selector("#send:has-text('Send')")
    page.wait_for_timeout(200)  # the old answer's end comes, and is nobody's
    asked = staged(page, {"content": "Yes."})
    say(page, "Short.")
    assert [message["role"] for message in asked[0]["messages"]] == ["user"]
    assert page.locator(".turn").count() == 2


def test_what_was_refused_goes_back_to_where_it_was_written(page: Any, files: Path) -> None:
    error = {"error": {"message": "Too much.", "type": "invalid_request_error", "param": None, "code": None}}
    page.route(CHAT, lambda route: route.fulfill(status=400, json=error))
    add(page, files / "wide.png")
    page.fill("#text", "What?")
    page.keyboard.press("Enter")
    page.wait_for_selector(".problem:has-text('Too much.')")
    assert page.input_value("#text") == "What?" and page.locator(".chip").count() == 1
    assert page.locator(".turn.user").count() == 0
    page.locator(".chip button[aria-label^='Remove']").click()
    page.unroute(CHAT)
    asked = staged(page, {"content": "Yes."})
    say(page, "Without.")
    assert len(asked[0]["messages"]) == 1 and len(asked[0]["messages"][0]["content"]) == 1


def test_a_busy_server_does_not_spoil_a_file(page: Any, files: Path) -> None:
    page.route("**/tokenize", lambda route: route.fulfill(status=429, json={"error": {"message": "Later."}}))
    page.set_input_files("#files", [str(files / "wide.png")])
    page.wait_for_selector(".chip .facts span:has-text('Later.')")
    assert page.locator(".chip .problem").count() == 0
    asked = staged(page, {"content": "Yes."})
    say(page, "What?")
    assert asked[0]["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png")


def test_a_talk_can_be_copied_as_python_and_as_curl(page: Any, files: Path, tmp_path: Path) -> None:
    staged(page, {"content": "Yes."})
    add(page, files / "wide.png")
    say(page, "It's what?")
    page.locator(".deeds button", has_text="Python").click()
    code = page.locator("body").evaluate("() => navigator.clipboard.readText()")
    compile(code, "copied", "exec")
    assert 'data_uri("wide.png", "image/png")' in code and "It's what?" in code and "from openai import OpenAI" in code
    assert '"grounding": {"format": "pixels"}' in code and 'os.environ.get("QVL_API_KEY", "none")' in code
    page.locator(".deeds button", has_text="cURL").click()
    line = page.locator("body").evaluate("() => navigator.clipboard.readText()")
    assert (
        '"Authorization: Bearer ${QVL_API_KEY:-none}"' in line
        and "base64 < 'wide.png'" in line
        and "It'\\''s what?" in line
        and "/v1/chat/completions" in line
    )


def test_on_a_phone_in_the_dark_nothing_sticks_out(browser: Any, server: Server, files: Path) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 740}, color_scheme="dark")
    page = context.new_page()
    page.goto(address(server))
    page.wait_for_selector("#model option", state="attached")
    assert page.locator("html").get_attribute("data-theme") == "dark"
    add(page, files / "wide.png", files / "two.pdf")
    assert page.locator("html").evaluate("(e) => e.scrollWidth") == 360
    assert page.locator("header").bounding_box()["height"] < 60
    page.click("#settings")
    assert page.locator("#panel").bounding_box()["width"] == 360
    assert not page.locator("#l-thinking_budget").is_visible()
    context.close()


def test_again_keeps_the_history_and_asks_the_last_question_anew(page: Any) -> None:
    asked = staged(page, {"content": "red"})
    say(page, "First?")
    say(page, "Second?")
    page.locator("button:has-text('Again')").last.click()
    page.wait_for_function("document.querySelectorAll('.turn.assistant .deeds').length === 2")
    words = [[(m["role"], m["content"]) for m in request["messages"]] for request in asked]
    assert len(words) == 3 and words[2] == words[1]
    assert [role for role, _ in words[2]] == ["user", "assistant", "user"]
    page.locator("button:has-text('Again')").first.click()
    page.wait_for_function("document.querySelectorAll('.turn.assistant .deeds').length === 1")
    assert [[m["role"] for m in request["messages"]] for request in asked[3:]] == [["user"]]
    assert page.locator(".turn").count() == 2
