"""Tests of the web page at /, in a real browser."""

import ast
import base64
import hashlib
import re

import pytest
import torch

from mhmoe_ray.data.chat.template import BUILT_IN_TEMPLATE, ChatTemplate
from mhmoe_ray.data.tokenizer import END_OF_TEXT
from mhmoe_ray.serving.api.app import create_app
from mhmoe_ray.spec import KeySpec, ServeSpec
from tests.serving.asking import call
from tests.serving.conftest import SPEC, build_model, build_tokenizer, serve_app
from tests.serving.own import create_answerer

KEY = KeySpec(name="ann", sha256=hashlib.sha256(b"secret").hexdigest())
SCRIPTS = ("<script>document.title = 'broken';</script>", "<img src=x onerror=\"document.title = 'broken';\">")


@pytest.fixture(scope="module")
def script_answerer():
    """Yield the answerer of a chat model that answers everything with HTML that would run a script."""
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(list(SCRIPTS))
    model = build_model(SPEC.model_copy(update={"tied_embeddings": False}))
    # The rows are opposite, so that one of them has a large logit, whatever the model has read.
    row = 1000 * torch.ones(SPEC.d_model).cumsum(0).cos()
    model.output.weight.zero_()
    for script, sign in zip(SCRIPTS, (1, -1), strict=True):
        model.output.weight[tokenizer.token_to_id(script)] = sign * row
    template = ChatTemplate(BUILT_IN_TEMPLATE, END_OF_TEXT, END_OF_TEXT)
    answerer = create_answerer(model, tokenizer, 256, ServeSpec(), template)
    yield answerer
    answerer.engine.close()


@pytest.mark.parametrize("path", ["/", "/chat"])
def test_page_policy_allows_only_its_own_script_and_style(script_answerer, path):
    response = call(create_app(script_answerer, "tiny", ServeSpec(keys=(KEY,))), "GET", path)
    assert response.headers["content-type"].startswith("text/html")
    policy = response.headers["content-security-policy"]
    for tag in ("script", "style"):
        [content] = re.findall(f"<{tag}>(.*?)</{tag}>", response.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "PAGE_" not in response.text


def test_model_without_chat_template_has_no_chat_page(answerer):
    response = call(create_app(answerer, "tiny", ServeSpec()), "GET", "/chat")
    message = "this model has no chat template, so it has no chat page"
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": "no_chat_template"}
    assert (response.status_code, response.json()) == (404, {"error": error})


@pytest.mark.parametrize(("limit", "tokens"), [(8, 8), (512, 64)])
def test_page_proposes_a_number_of_tokens_that_the_server_allows(answerer, limit, tokens):
    page = call(create_app(answerer, "tiny", ServeSpec(max_tokens=limit)), "GET", "/").text
    assert re.findall(r'<input id="max_tokens" [^>]*value="(.*?)"', page) == [str(tokens)]


@pytest.mark.system
@pytest.mark.parametrize("width", [390, 1200])
def test_page_fits_the_screen_and_examples_fill_the_prompt(browser, answerer, width):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    with serve_app(create_app(answerer, "tiny-abc123", ServeSpec())) as url:
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False},
        )
        browser.get(url)
        WebDriverWait(browser, 60).until(lambda _: browser.find_elements(By.CSS_SELECTOR, "#facts li"))
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        browser.find_elements(By.CSS_SELECTOR, "#examples button")[0].click()
        assert browser.find_element(By.ID, "prompt").get_attribute("value") == "Once upon a time"
        assert browser.find_element(By.ID, "go").text == "Generate"
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.system
def test_answer_is_streamed_and_can_be_stopped(browser, tokenizer):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    def element(name):
        return browser.find_element(By.ID, name)

    def submit(tokens):
        element("max_tokens").clear()
        element("max_tokens").send_keys(str(tokens))
        element("go").click()

    def wait_for(condition):
        return WebDriverWait(browser, 60, 0.02).until(lambda _: condition())

    spec = ServeSpec(max_tokens=4000, keys=(KEY,))
    answerer = create_answerer(build_model(), tokenizer, 4096, spec)
    try:
        with serve_app(create_app(answerer, "tiny-abc123", spec)) as url:
            browser.get(url)
            element("prompt").send_keys("the quick brown")
            submit(20)
            wait_for(lambda: "no such API key" in element("status").text)
            assert "error" in element("status").get_attribute("class")

            element("key").send_keys("secret")
            element("temperature").clear()
            element("temperature").send_keys("0")  # greedy, because a drawn token may end the answer
            submit(20)
            wait_for(lambda: element("status").text.startswith("20 tokens in "))
            assert element("model").text == "tiny-abc123"
            facts = [item.text for item in element("facts").find_elements(By.TAG_NAME, "li")]
            assert "checkpoint tiny-abc123/step_00000040.1" in facts
            assert any("experts, top-" in fact for fact in facts)
            assert element("answer").text.startswith("the quick brown")
            assert len(element("answer").text) > len("the quick brown")

            submit(4000)
            wait_for(lambda: len(element("answer").text) > 100)
            assert not element("go").is_enabled()  # a part of the answer is shown, but it is not complete
            element("stop").click()
            wait_for(lambda: element("status").text == "stopped")
            wait_for(lambda: answerer.engine.stats().running == 0)

            element("max_tokens").clear()
            submit(5000)
            wait_for(lambda: "this server allows at most 4000" in element("status").text)
            console = [line["message"] for line in browser.get_log("browser")]
            assert all("401" in line or "400" in line for line in console), console
    finally:
        answerer.engine.close()


@pytest.mark.system
@pytest.mark.parametrize("width", [390, 1200])
def test_conversation_is_shown_as_text_and_sent_with_each_message(browser, script_answerer, caplog, width):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    def element(name):
        return browser.find_element(By.ID, name)

    def wait_for(condition):
        return WebDriverWait(browser, 60, 0.02).until(lambda _: condition())

    def messages():
        return [(node.get_attribute("class"), node.text) for node in browser.find_elements(By.CSS_SELECTOR, "#log div")]

    caplog.set_level("INFO", "ray.serve")
    app = create_app(script_answerer, "tiny-abc123", ServeSpec(max_tokens=3, keys=(KEY,), log_prompts=True))
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    with serve_app(app) as url:
        browser.get(url)
        assert not element("chat").is_displayed()
        browser.get(f"{url}/chat")
        wait_for(lambda: element("status").text == "this server asks for an API key")
        element("message").send_keys("the fox\n")
        # The message stays where it can be sent again.
        wait_for(lambda: "no such API key" in element("status").text)
        assert (messages(), element("message").get_attribute("value")) == ([], "the fox")
        element("key").send_keys("secret\t")
        wait_for(lambda: element("model").text == "tiny-abc123")
        element("message").send_keys("\n")
        wait_for(lambda: element("status").text.startswith("3 tokens in "))
        element("message").send_keys(f"{SCRIPTS[0]}\n")
        wait_for(lambda: len(messages()) == 4 and element("go").is_enabled())
        (_, answer), (_, second_answer) = messages()[1::2]
        assert messages() == [
            ("user", "the fox"), ("assistant", answer), ("user", SCRIPTS[0]), ("assistant", second_answer)
        ]  # fmt: skip
        assert {*re.findall("<.*?>", answer)} <= {*re.findall("<.*?>", "".join(SCRIPTS))}
        assert browser.title == "tiny-abc123"
        assert browser.find_elements(By.CSS_SELECTOR, "#log script, #log img") == []
        prompt = ast.literal_eval(caplog.records[-1].getMessage().removeprefix("ann asks: "))
        assert f"User:\nthe fox\nAssistant:\n{answer}" in prompt
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        element("reset").click()
        assert messages() == []
        element("message").send_keys("the dog\n")
        wait_for(lambda: len(messages()) == 2 and element("go").is_enabled())
        assert "the fox" not in caplog.records[-1].getMessage()
        browser.get(url)
        element("key").send_keys("secret\t")
        wait_for(lambda: element("chat").is_displayed())
        element("chat_link").click()
        wait_for(lambda: browser.current_url == f"{url}/chat")
        console = [line["message"] for line in browser.get_log("browser")]
        assert all("401" in line for line in console), console
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
