"""The page at /, in a real browser."""

import base64
import hashlib
import re

import pytest

from mhmoe_ray.serve.api.app import create_app
from mhmoe_ray.spec import KeySpec, ServeSpec
from tests.serve.asking import call
from tests.serve.conftest import build_model, running
from tests.serve.own import answerer_of

KEY = KeySpec(name="ann", sha256=hashlib.sha256(b"secret").hexdigest())


def test_the_page_may_run_its_own_script_and_no_other(answerer):
    response = call(create_app(answerer, "tiny", ServeSpec(keys=(KEY,))), "GET", "/")
    assert response.headers["content-type"].startswith("text/html")
    policy = response.headers["content-security-policy"]
    for tag in ("script", "style"):
        [inside] = re.findall(f"<{tag}>(.*?)</{tag}>", response.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


@pytest.mark.system
@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_fits_and_its_examples_fill_the_prompt(browser, answerer, width):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    with running(create_app(answerer, "tiny-abc123", ServeSpec())) as url:
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
def test_a_prompt_is_answered_as_it_is_made_and_can_be_stopped(browser, tokenizer):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    def at(name):
        return browser.find_element(By.ID, name)

    def ask(tokens):
        at("max_tokens").clear()
        at("max_tokens").send_keys(str(tokens))
        at("go").click()

    def until(condition):
        return WebDriverWait(browser, 60, 0.02).until(lambda _: condition())

    spec = ServeSpec(max_tokens=4000, keys=(KEY,))
    answerer = answerer_of(build_model(), tokenizer, 4096, spec)
    try:
        with running(create_app(answerer, "tiny-abc123", spec)) as url:
            browser.get(url)
            at("prompt").send_keys("the quick brown")
            ask(20)
            until(lambda: "no such API key" in at("status").text)
            assert "wrong" in at("status").get_attribute("class")

            at("key").send_keys("secret")
            at("temperature").clear()
            at("temperature").send_keys("0")  # a drawn token may be the end
            ask(20)
            until(lambda: at("status").text.startswith("20 tokens in "))
            assert at("model").text == "tiny-abc123"
            facts = [item.text for item in at("facts").find_elements(By.TAG_NAME, "li")]
            assert "checkpoint tiny-abc123/step_00000040.1" in facts
            assert any("experts, top-" in fact for fact in facts)
            assert at("answer").text.startswith("the quick brown")
            assert len(at("answer").text) > len("the quick brown")

            ask(4000)
            until(lambda: len(at("answer").text) > 100)
            assert not at("go").is_enabled()  # it is shown while more comes
            at("stop").click()
            until(lambda: at("status").text == "stopped")
            until(lambda: answerer.engine.stats().running == 0)

            at("max_tokens").clear()
            ask(5000)
            until(lambda: "this server allows at most 4000" in at("status").text)
            console = [line["message"] for line in browser.get_log("browser")]
            assert all("401" in line or "400" in line for line in console), console
    finally:
        answerer.engine.close()
