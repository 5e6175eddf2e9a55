"""Tests of reports on runs with known numbers."""

import math
import re
from html.parser import HTMLParser

import pytest

from mhmoe_ray.errors import DataError, RunError
from mhmoe_ray.evaluate.request import EvalRequest, Evaluation, RoutingCounts, load_evaluations, save_evaluation
from mhmoe_ray.evaluate.score import Score
from mhmoe_ray.planner.sizes import flops_per_token
from mhmoe_ray.report.comparison import compare_runs
from mhmoe_ray.report.figures import RunFigures
from mhmoe_ray.report.page import render_page, write_report
from mhmoe_ray.report.plots import draw_differences, draw_validation
from mhmoe_ray.report.variants import Variant, losses_at, matched_step
from mhmoe_ray.report.verdicts import compare_variants
from mhmoe_ray.runs import events, history, metrics
from mhmoe_ray.runs.directory import RunDir, mark_imported
from mhmoe_ray.spec import DataSpec, RunSpec, StartSpec
from tests.report.runs import MOE, make_run, read_variants, six_runs

pytestmark = pytest.mark.long


def page_text(runs):
    """Return the page of a report without its plots, with single spaces between words."""
    return " ".join(render_page(compare_runs(runs), {}).split())


def test_runs_that_differ_in_their_seed_alone_are_one_variant(tmp_path):
    all_variants = read_variants([*six_runs(tmp_path), make_run(tmp_path, "other", 0, 2.0, moe={**MOE, "top_k": 1})])
    assert [(v.name, len(v.runs)) for v in all_variants] == [("dense", 3), ("mhmoe-h2", 3), ("other", 1)]
    assert matched_step(all_variants) == 20
    assert all_variants[0].mean_loss(20) == pytest.approx(3.1)
    assert all_variants[0].deviation(20) == pytest.approx(0.1)
    assert all_variants[2].deviation(20) is None


def test_runs_that_start_from_the_run_of_their_seed_are_one_variant(tmp_path):
    """A sweep starts each run from the checkpoint of another run with the same seed."""
    runs = []
    for seed in (0, 1):
        base = make_run(tmp_path, "base", seed, 3.0)
        for name, source in (("branch", f"{base.path}/checkpoints/step_00000020.{1 + seed}"), ("fixed", "hf:a/b@1")):
            run = make_run(tmp_path, name, seed, 2.0)
            run.write_spec(run.spec().model_copy(update={"start": StartSpec(**{"from": source})}))
            runs.append(run)
    assert [(variant.name, len(variant.runs)) for variant in read_variants(runs)] == [("branch", 2), ("fixed", 2)]
    # A start from a run with another seed is another training.
    other_run = make_run(tmp_path, "branch", 2, 2.0)
    source = runs[0].spec().start.sources[0]
    other_run.write_spec(other_run.spec().model_copy(update={"start": StartSpec(**{"from": source})}))
    assert len(read_variants([runs[0], other_run])) == 2


def test_runs_distributed_in_different_ways_by_name_are_separate_variants(tmp_path):
    runs = [
        make_run(tmp_path, name, seed, 3.0, speed=speed)
        for name, speed in (("ddp", 100.0), ("fsdp", 50.0))
        for seed in (0, 1)
    ]
    for run in runs[2:]:
        spec = run.spec()
        run.write_spec(spec.model_copy(update={"cluster": spec.cluster.model_copy(update={"strategy": "fsdp"})}))
    both_variants = read_variants(runs)
    assert [(v.name, len(v.runs), v.tokens_per_s) for v in both_variants] == [("ddp", 2, 110.5), ("fsdp", 2, 60.5)]
    ep_run = make_run(tmp_path, "ddp", 2, 3.0)
    spec = ep_run.spec()
    ep_run.write_spec(spec.model_copy(update={"cluster": spec.cluster.model_copy(update={"ep": 1})}))
    assert [len(v.runs) for v in read_variants([*runs[:2], ep_run])] == [
        3
    ]  # Runs of one name are one variant, however each was distributed.


def test_an_unfinished_run_does_not_count_beside_a_finished_one(tmp_path):
    [variant] = read_variants([make_run(tmp_path, "a", 0, 3.0), make_run(tmp_path, "a", 1, 9.0, steps=10)])
    assert variant.losses(20) == {0: 3.0}
    [unfinished_variant] = read_variants([make_run(tmp_path, "b", 1, 9.0, steps=10)])
    assert len(unfinished_variant.runs) == 1


def test_a_seed_that_ended_early_is_named(tmp_path):
    failed_run = make_run(tmp_path, "dense", 3, 3.0, steps=15)
    events.record(failed_run, "failed", reason="training: the gradient is not finite")
    page = page_text([*six_runs(tmp_path), failed_run])
    assert f"ended early, unlike others:</strong> {failed_run.id} (failed)." in page


def test_started_and_failed_runs_do_not_change_the_compared_step(tmp_path):
    """A run that still trains and has been validated does change the compared step, to the last step at which all runs
    were validated."""
    top_1_moe = {**MOE, "top_k": 1}
    started_run = make_run(tmp_path, "began", 0, 3.0, moe={**MOE, "top_k": 3}, steps=3, end_event=None)
    failed_run = make_run(tmp_path, "failed", 0, 3.0, moe={**MOE, "top_k": 4}, steps=10, end_event="failed")
    runs = [*six_runs(tmp_path), make_run(tmp_path, "b", 0, 3.0, moe=top_1_moe), started_run, failed_run]
    verdicts = compare_runs(runs).verdicts
    assert [(v.variant, v.step) for v in verdicts] == [("mhmoe-h2", 20), ("b", 20)]
    page = page_text(runs)
    assert f"ended early, unlike others:</strong> {failed_run.id} (failed)." in page
    assert '<td>began</td><td data-label="loss"></td>' in page
    unfinished_run = make_run(tmp_path, "on", 0, 3.0, moe={**MOE, "top_k": 4}, steps=10, end_event=None)
    verdicts = compare_runs([*six_runs(tmp_path), unfinished_run]).verdicts
    assert [(v.variant, v.step) for v in verdicts] == [("mhmoe-h2", 10), ("on", 10)]


def test_the_newer_of_two_runs_with_a_seed_counts_and_the_older_is_named(tmp_path):
    runs = [make_run(tmp_path, "a", 0, 3.0), make_run(tmp_path, "a", 1, 3.1)]
    newer_run = make_run(tmp_path, "again", 0, 4.0)
    for ordered_runs in ([*runs, newer_run], [newer_run, *runs]):
        [variant] = read_variants(ordered_runs)
        assert variant.losses(20) == {0: 4.0, 1: 3.1}
        assert len(variant.runs) == 2
    page = page_text([*runs, newer_run])
    assert f"a newer run has the same seed:</strong> {runs[0].id} (seed 0)." in page
    early = [make_run(tmp_path, "b", 0, 3.0, moe={**MOE, "top_k": 1}, steps=10, end_event=None) for _ in range(2)]
    page = page_text(early)
    assert f"a newer run has the same seed:</strong> {early[0].id} (seed 0)." in page
    assert "ended early" not in page


def test_runs_on_different_held_out_text_are_separate_variants_and_reported_as_unequal(tmp_path):
    runs = [make_run(tmp_path, "a", seed, 3.0) for seed in (0, 1)]
    for run, tokens in zip(runs, (130_950, 130_853), strict=True):
        figures = {"unigram_entropy": 6.5, "bigram": 4.4, "bigram_tokens": 20_000}
        events.record(run, "prepared", validation_tokens=tokens, **figures)
    assert [len(v.runs) for v in read_variants(runs)] == [1, 1]
    assert "The variants differ in held-out text or tokenizer</strong>" in page_text(runs)


def test_losses_of_different_tokenizers_have_no_verdict(tmp_path):
    runs = [make_run(tmp_path, name, 0, 3.0) for name in ("a", "b")]
    spec = runs[1].spec()
    runs[1].write_spec(spec.model_copy(update={"model": spec.model.model_copy(update={"vocab_size": 299})}))
    for run in runs:
        events.record(run, "prepared", validation_tokens=100, unigram_entropy=6.5)
    comparison = write_report(runs, tmp_path / "out")
    assert comparison.verdicts == []
    page = page_text(runs)
    assert not re.search("nats (lower|higher)", page)
    assert "Losses of b and a cannot be compared" in page
    assert not (tmp_path / "out" / "loss_beside_baseline.png").exists()


def test_a_report_of_one_run_has_no_verdict_and_each_curve_once(tmp_path):
    run = make_run(tmp_path, "a", 0, 3.0)
    assert write_report([run], tmp_path / "out").verdicts == []
    assert "Verdict" not in (tmp_path / "out" / "report.html").read_text()
    assert [path.name for path in (tmp_path / "out").glob("loss_*.png")] == ["loss_by_steps.png"]


def test_trainings_of_different_lengths_are_reported_as_unequal(tmp_path):
    runs = [make_run(tmp_path, "a", 0, 3.0), make_run(tmp_path, "b", 0, 3.0)]
    spec = runs[1].spec()
    shorter = spec.train.model_copy(update={"steps": spec.train.steps - 1})
    runs[1].write_spec(spec.model_copy(update={"train": shorter}))
    assert "The variants differ in the number of steps" in page_text(runs)


def test_minutes_count_only_the_time_with_workers(tmp_path):
    run = make_run(tmp_path, "a", 0, 3.0, steps=10)
    # The run continues three days later, from a checkpoint of step 8. The time in between does not count.
    for step in (9, 10, 11):
        line = {metrics.STEP: step, metrics.TIME: 300_000.0 + step, metrics.LOSS: 3.0, metrics.GROUP: 2}
        history.append(run, {**line, metrics.TOKENS: 128 * step, metrics.TOKENS_PER_S: 100.0})
    history.flush(run)
    assert RunFigures.read(run).seconds == 7 + 2


def test_training_flops_are_those_of_the_plan(tmp_path):
    run = RunFigures.read(make_run(tmp_path, "a", 0, 3.0))
    assert run.flops(1000) == 1000 * flops_per_token(run.spec.model, 16).training
    assert run.tokens_per_s == 110.5


def test_diverged_runs_and_runs_without_numbers_are_left_out_and_named(tmp_path):
    runs = [*six_runs(tmp_path), make_run(tmp_path, "nan", 0, math.nan), make_run(tmp_path, "waiting", 0, 3.0, steps=0)]
    verdicts = compare_runs(runs).verdicts
    assert [(v.variant, v.step) for v in verdicts] == [("mhmoe-h2", 20)]
    page = page_text(runs)
    assert f"not finite:</strong> {runs[6].id}." in page
    assert f"no numbers yet: {runs[7].id}." in page


def test_runs_that_all_diverged_are_compared(tmp_path):
    runs = [make_run(tmp_path, "a", 0, math.nan), make_run(tmp_path, "b", 0, math.nan, moe={**MOE, "top_k": 1})]
    write_report(runs, tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "All runs diverged: no last validation loss is finite." in page
    assert "Left out" not in page


def test_a_diverged_baseline_is_an_error(tmp_path):
    runs = [*six_runs(tmp_path), make_run(tmp_path, "nan", 0, math.nan, moe={**MOE, "top_k": 1})]
    with pytest.raises(RunError, match="baseline nan: the last validation of its runs is not finite; choose from d"):
        compare_runs(runs, baseline="nan")


def test_a_baseline_that_ended_early_is_an_error(tmp_path):
    runs = [
        *six_runs(tmp_path),
        make_run(tmp_path, "early", 0, 3.0, moe={**MOE, "top_k": 1}, steps=10, end_event="failed"),
    ]
    with pytest.raises(RunError, match="baseline early: its runs ended early, unlike others; choose from d"):
        compare_runs(runs, baseline="early")


def test_unequal_trainings_are_reported(tmp_path):
    runs = [make_run(tmp_path, "a", 0, 3.0), make_run(tmp_path, "b", 0, 3.0, micro_batches=8)]
    assert "<strong>The variants differ in tokens in a step</strong>" in page_text(runs)


def test_a_verdict_is_students_t_over_pairs_of_seeds(tmp_path):
    dense, mhmoe = read_variants(six_runs(tmp_path))
    [verdict] = compare_variants(dense, [mhmoe], 20)
    differences = [-0.1, -0.12, -0.09]
    mean = sum(differences) / 3
    deviation = math.sqrt(sum((d - mean) ** 2 for d in differences) / 2)
    half = 4.302653 * deviation / math.sqrt(3)  # 97.5 per cent quantile of t for 2 degrees of freedom
    assert verdict.difference == pytest.approx(mean)
    assert (verdict.low, verdict.high) == pytest.approx((mean - half, mean + half), abs=1e-6)
    assert verdict.is_clear
    assert verdict.paired
    start = (
        "mhmoe-h2 to dense: better; 0.1033 nats lower, perplexity 9.8% lower (95% interval -0.1413 to -0.0654, 3 seeds"
    )
    assert verdict.text.startswith(start)


def test_losses_are_paired_over_two_common_seeds_or_all_seeds_of_one_variant(tmp_path):
    dense, mhmoe = read_variants(six_runs(tmp_path))
    two = losses_at(20, dense, Variant("two", mhmoe.runs[1:]))
    assert two.paired
    assert two.differences == pytest.approx([-0.12, -0.09])
    single = losses_at(20, dense, Variant("single", mhmoe.runs[:1]))
    assert single.paired
    assert single.differences == pytest.approx([2.9 - 3.0])
    first_variant, last_variant = Variant("first", dense.runs[:2]), Variant("last", mhmoe.runs[1:])
    unpaired = losses_at(20, first_variant, last_variant)
    assert not unpaired.paired
    assert unpaired.differences == pytest.approx([2.98 - 3.05, 3.11 - 3.05])
    [axis] = draw_differences([first_variant, last_variant], first_variant).axes
    assert axis.lines[1].get_ydata()[-1] == pytest.approx(
        compare_variants(first_variant, [last_variant], 20)[0].difference
    )


def test_speed_and_balance_on_the_page_are_means_over_the_runs(tmp_path):
    speeds_and_balances = [(1000.0, 1.0), (2000.0, 1.1), (6000.0, 1.5)]
    runs = [
        make_run(tmp_path, "a", seed, 3.0, speed=speed, balance=b)
        for seed, (speed, b) in enumerate(speeds_and_balances)
    ]
    [variant] = read_variants(runs)
    assert variant.tokens_per_s == pytest.approx(3010.5)
    assert variant.recent_mean(metrics.BALANCE) == pytest.approx(1.2 + (1 / 19 + 1 / 20) / 2)
    assert variant.recent_mean(metrics.MFU) is None
    assert '<td data-label="tokens/s">3,010</td>' in page_text(runs)


def test_unpaired_seeds_are_left_out_and_one_seed_gives_no_interval(tmp_path):
    dense, mhmoe = read_variants(six_runs(tmp_path))
    [two] = compare_variants(dense, [Variant("two", mhmoe.runs[1:])], 20)
    assert (two.seeds, two.paired) == (2, True)
    assert two.difference == pytest.approx(-0.105)
    [single_seed] = compare_variants(dense, [Variant("one", mhmoe.runs[:1])], 20)
    assert (single_seed.low, single_seed.is_clear) == (None, False)
    assert "its uncertainty is unknown" in single_seed.text
    assert compare_variants(dense, [mhmoe], 19) == []


def store_evaluation(run, tokens_of, distinct, step=20, **request_fields):
    """Store an evaluation of a run's checkpoint, of 100 tokens with a loss of 3 nats each and 4 bytes each.

    Args:
        run: The run directory.
        tokens_of: The number of tokens that use each expert of the only layer.
        distinct: The number of tokens whose sub-tokens use 0, 1, 2, ... distinct experts.
        step: The step of the checkpoint.
        request_fields: Fields of the request, by default `prepared="/data"`.
    """
    counts = RoutingCounts(
        tokens=100,
        counts=[[100] * 4],
        tokens_of=[tokens_of],
        distinct=[distinct],
        agreement=[[[100, 10], [10, 100]]],
        first_weight=[80.0],
    )
    default_fields = {"prepared": None, "text": None, "samples": 0, "tasks": [], "task_folders": [], "limit": None}
    resource_fields = {"batch": 8, "half": False, "cpus": 1, "gpus": 0}
    checkpoint_fields = {"run": str(run.path), "checkpoint": f"step_{step:08d}.1"}
    request = EvalRequest(
        **checkpoint_fields, **resource_fields, **(default_fields | (request_fields or {"prepared": "/data"}))
    )
    score = Score(nats=300.0, tokens=100, text_bytes=400)
    answer = {"domains": {"a": score}, "languages": {}, "routing": {"a": counts}, "tasks": {}}
    save_evaluation(run, Evaluation(request=request, step=step, tokens=2560, seconds=1.0, **answer))


def test_loads_of_training_are_labelled_if_no_held_out_text_was_evaluated(tmp_path):
    runs = [make_run(tmp_path, "a", 0, 3.0), make_run(tmp_path, "b", 0, 3.0, moe={**MOE, "top_k": 1})]
    store_evaluation(runs[0], [60] * 4, [0, 0, 0, 60, 40])
    text = DataSpec.model_validate({"sources": {"own": {"path": "own.txt"}}, "prepared": "none", "seq_len": 16})
    store_evaluation(runs[1], [60] * 4, [0, 60, 40], text=text)
    assert '<p class="small">The loads of b were counted in training.' in page_text(runs)


def test_bits_per_byte_name_their_step_if_losses_have_another(tmp_path):
    runs = [make_run(tmp_path, "a", seed, 3.0) for seed in (0, 1)]
    expected = 300 / math.log(2) / 400
    for steps, expected_text in (((10, 20), ""), ((10, 10), f"{expected:.4f}, step 10"), ((20, 20), f"{expected:.4f}")):
        for run, step in zip(runs, steps, strict=True):
            for old_evaluation in run.evaluations.glob("*"):
                old_evaluation.unlink()
            store_evaluation(run, [60] * 4, [0, 0, 0, 60, 40], step=step)
        assert f'<td data-label="bits/byte">{expected_text}</td>' in page_text(runs)


def test_evaluations_of_a_step_are_sorted_by_key(tmp_path):
    run = make_run(tmp_path, "a", 0, 3.0)
    for n in range(20):
        store_evaluation(run, [60] * 4, [0, 0, 0, 60, 40], prepared=f"/data/{n}")
    keys = [evaluation.request.key for evaluation in load_evaluations(run)]
    assert keys == sorted(keys)


class LinkCollector(HTMLParser):
    """Parser that collects the targets of all links and sources of a page in `links`."""

    def __init__(self):
        super().__init__()
        self.links = []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.links += [v for k, v in attributes.items() if k in ("src", "href", "xlink:href")]


def test_the_page_is_self_contained_and_has_its_images_beside_it(tmp_path):
    runs = [*six_runs(tmp_path), make_run(tmp_path, "top-1", 0, 3.0, moe={**MOE, "top_k": 1, "d_sub_token": 16})]
    store_evaluation(runs[3], tokens_of=[60] * 4, distinct=[0, 0, 0, 60, 40])
    store_evaluation(runs[6], tokens_of=[60, 60, 60, 0], distinct=[0, 100, 0])
    verdicts = write_report(runs, tmp_path / "out", baseline="mhmoe-h2").verdicts
    assert [v.variant for v in verdicts] == ["dense", "top-1"]
    page = (tmp_path / "out" / "report.html").read_text()
    links = LinkCollector()
    links.feed(page)
    assert [link for link in links.links if not link.startswith(("#", "data:"))] == []
    assert "<script" not in page
    use = "compared with mhmoe-h2, top-1 has fewer at 0.001 (75.0% to 100.0%), 0.002"
    for part in (
        verdicts[0].text,
        "h 2, E 4, k 2, f 24",
        "h 2, D 16, E 4, k 1, f 24",
        "model.moe.heads",
        "85.0%",
        "10.0%",
        use,
    ):
        assert part in page, part
    images = {p.stem for p in (tmp_path / "out").glob("*.png")}
    assert {"loss_by_steps", "loss_by_flops", "loss_beside_baseline", "activation", "load_mhmoe_h2"} <= images
    assert page.count("<figure") == len(images)
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in (tmp_path / "out").glob("*.png"))
    assert "dropped" not in images  # no sub-token was dropped, so there is nothing to show


def test_a_loss_with_an_overflowing_perplexity_is_reported(tmp_path):
    runs = [make_run(tmp_path, "a", seed, 3.0 + seed / 10) for seed in (0, 1)]
    runs += [make_run(tmp_path, "b", seed, 800.0 + seed, moe={**MOE, "top_k": 1}) for seed in (0, 1)]
    [verdict] = write_report(runs, tmp_path / "out").verdicts
    assert verdict.text.startswith("b to a: worse; 797.4500 nats higher (")


def test_shares_of_experts_in_use_are_compared_by_threshold():
    from mhmoe_ray.report.figures import RouteSummary, compare_expert_use

    def routes(*activated):
        return RouteSummary(None, "", [*activated, *([0.0] * (9 - len(activated)))], [], None, None)

    assert compare_expert_use("smoe", "mhmoe", routes(1.0, 0.5), routes(1.0, 0.5)) == (
        "mhmoe has the same share of its experts in use as smoe at every threshold"
    )
    assert compare_expert_use("smoe", "mhmoe", routes(1.0, 0.5, 0.5), routes(1.0, 0.75, 0.25)) == (
        "compared with smoe, mhmoe has more at 0.002 (75.0% to 50.0%) and fewer at 0.005 (25.0% to 50.0%) of its "
        "experts in use; the rest is equal"
    )
    assert compare_expert_use("smoe", "mhmoe", RouteSummary(None, "", None, [], None, None), routes(1.0)) is None


def test_a_folder_that_cannot_be_created_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"report .*file/out: Not a directory; name a folder you can write"):
        write_report(six_runs(tmp_path), tmp_path / "file" / "out")


def test_imported_runs_unknown_baselines_and_runs_without_numbers_are_errors(tmp_path):
    imported = RunDir(tmp_path / "imported-000000")
    imported.path.mkdir()
    mark_imported(imported)
    with pytest.raises(RunError, match="run imported-000000: it was imported"):
        compare_runs([imported])
    with pytest.raises(RunError, match="choose from dense, mhmoe-h2"):
        compare_runs(six_runs(tmp_path), baseline="smoe")
    with pytest.raises(RunError, match="none of the runs has numbers yet"):
        compare_runs([make_run(tmp_path, "a", 0, 3.0, steps=0)])


@pytest.mark.system
@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_fits_a_phone_and_a_laptop(tmp_path, browser, width):
    names = [
        "dense",
        "smoe-top2-experts8",
        "mhmoe-h2-experts16",
        "mhmoe-h4-experts32-balance",
        "deepseekmoe-fine",
        "h8",
    ]
    moes = [None, *({**MOE, "experts": 4 * n} for n in range(1, 6))]
    runs = [
        make_run(tmp_path, name, s, 3.0 - 0.1 * s, moe=moe)
        for name, moe in zip(names, moes, strict=True)
        for s in (0, 1)
    ]
    write_report(runs, tmp_path / "report")
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
    )
    browser.get((tmp_path / "report" / "report.html").as_uri())
    for details in browser.find_elements("css selector", "details:not([open]) > summary"):
        details.click()
    wide = browser.execute_script(
        "return [...document.querySelectorAll('body *')].filter(e => !e.closest('svg')"
        " && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"
    )
    assert wide == []


def test_a_single_validation_has_no_loss_curve(tmp_path):
    write_report([make_run(tmp_path, "a", 0, 3.0, validated=20)], tmp_path / "report")
    assert not list((tmp_path / "report").glob("loss_by_*.png"))
    assert "20.09" in (tmp_path / "report" / "report.html").read_text()


def test_only_losses_of_tokens_have_a_perplexity(tmp_path):
    """The loss of an encoder or a vision model is a sum over objectives with different units."""
    variants = read_variants(six_runs(tmp_path))
    for unit in ("nats per token", "nats per pair", "sum over all parts"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RunSpec, "loss_unit", unit)
            figure = draw_validation(variants, "steps")
            [axis] = figure.axes
            assert axis.get_ylabel() == unit
            assert len(axis.child_axes) == (unit == "nats per token")
            assert draw_differences(variants, variants[0]).axes[0].get_ylabel() == unit
            assert f"held-out samples: {unit}." in page_text([run.run for v in variants for run in v.runs])
