"""Fixture with a real browser, driven by Selenium."""

import shutil

import pytest


@pytest.fixture(scope="module")
def browser():
    """Yield Selenium's driver of a headless Chromium; skip the test where Chromium or its driver is not installed."""
    from selenium import webdriver

    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs chromium and chromedriver, Debian's packages chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--window-size=900,700"):
        options.add_argument(argument)
    # Let the browser record all messages of the page's console, because tests read them.
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()
