"""Tests that estimates stay near published measurements, and that the page has them."""

import statistics

import pytest

from tests.measured import MEASUREMENTS, PAGE, page, ratio


@pytest.mark.long
def test_page_has_the_estimates():
    assert PAGE.read_text() == page()


@pytest.mark.long
def test_estimates_are_near_measurements():
    ratios = [ratio(measurement) for measurement in MEASUREMENTS]
    assert statistics.median(abs(value - 1) for value in ratios) <= 0.25
    assert all(1 / 1.6 <= value <= 1.6 for value in ratios)
