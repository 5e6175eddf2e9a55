"""Tests of the reports on images."""

import json

import numpy as np
import pytest

from mhmoe_ray.cli.data_inspect import survey_dict
from mhmoe_ray.cli.data_inspect_view import print_survey
from mhmoe_ray.data.inspect.lint import LintInput, lint
from mhmoe_ray.data.inspect.result import Survey, SurveyRequest
from mhmoe_ray.data.prepare.validation import is_validation
from mhmoe_ray.data.sources.images import image_hash
from mhmoe_ray.spec import dump_spec
from tests.cli.run import mhmoe
from tests.data.inspect.surveys import survey_serially
from tests.data.texts import make_documents, write_documents
from tests.support.images import (
    CaptionedImage,
    encode_image,
    encoder_spec,
    make_images,
    tar_members,
    write_image_folder,
    write_tar,
)

IMAGES = make_images(30, size=40)
BANNERS = [
    CaptionedImage(f"banner{i}.png", encode_image(np.full((20, 100, 3), 20 * i, np.uint8)), f"a banner {i}")
    for i in range(4)
]
TEXTS = make_documents("text", 9)


@pytest.fixture
def spec(tmp_path):
    """Write pairs, one of them twice, images and texts; return the spec of an encoder that reads them."""
    members = [*tar_members(IMAGES), *tar_members([IMAGES[3]._replace(name="again.png")])]
    write_tar(tmp_path / "tar" / "a.tar", [*members, ("bad.png", b"no image"), ("bad.txt", b"a text")])
    write_image_folder(tmp_path / "folder" / "a", [*IMAGES[:5], *BANNERS])
    write_documents(tmp_path / "texts" / "f.jsonl", TEXTS)
    sources = {
        "pairs": {"path": "tar", "format": "webdataset"},
        "pictures": {"path": "folder", "format": "images"},
        "texts": {"path": "texts"},
    }
    return encoder_spec(tmp_path, sources, max_bad_lines=1)


def test_survey_counts_images_captions_and_copies(spec):
    survey = survey_serially(spec.data)
    pairs, pictures = survey.domains["pairs/all"].all_figures, survey.domains["pictures/a"].all_figures
    assert (pairs.documents, pairs.images.images, sum(pairs.lengths.values())) == (31, 31, 31)
    assert pairs.held_out == sum(is_validation(image_hash(picture.image), 0.2) for picture in [*IMAGES, IMAGES[3]])
    assert (pictures.documents, pictures.images.images, pictures.words) == (9, 9, 0)
    assert not pictures.lengths
    assert pictures.images.bytes == sum(len(picture.image) for picture in [*IMAGES[:5], *BANNERS])
    assert pictures.images.extreme == 4
    assert pictures.images.aspect_ratios[2.3] == 4
    assert survey.domains["texts/all"].all_figures.images.images == 0
    assert survey.copies.domains["pairs/all"].extra == 1
    # An image without a text is no copy of the pair with the same image.
    assert survey.copies.domains["pictures/a"].shared_texts == 0
    request = SurveyRequest(data=spec.data, tokenizer=None, rules=True)
    assert request.result_type is Survey


def test_inspect_prints_images(spec, capsys):
    summary = {"name": "tiny", **survey_dict(survey_serially(spec.data)), "prepared": None}
    assert summary["domains"]["pictures/a"]["images"]["shorter_sides"]["octaves"] == {16: 4, 32: 5}
    assert "images" not in summary["domains"]["texts/all"]
    json.dumps(summary)
    print_survey(summary, held_out=True)
    printed_text = capsys.readouterr().out
    assert "images, and the quantiles of their shorter sides in pixels" in printed_text
    assert "over 3:1" in printed_text


def test_lint_warns_of_small_and_narrow_images(spec):
    problems = lint(LintInput(survey_serially(spec.data), spec.data, spec, None))
    broken_rules = {(problem.rule, problem.subject) for problem in problems}
    # The banners are 20 pixels high, and the model reads 32 x 32.
    assert {("small-images", "pictures/a"), ("narrow-images", "pictures/a")} <= broken_rules
    assert ("unreadable", "pairs/all") in broken_rules
    assert ("small-images", "pairs/all") not in broken_rules
    assert not any(rule in ("too-small", "unread-files") for rule, _ in broken_rules)


def test_samples_of_an_encoder_are_not_shown_as_text(spec, tmp_path):
    (tmp_path / "spec.yaml").write_text(dump_spec(spec))
    result = mhmoe(tmp_path, "data", "inspect", "spec.yaml", "--samples", "1")
    assert result.code == 3
    assert "--samples shows texts of a decoder" in result.err
