"""Reports on runs whose numbers are known."""

import json
import math
from html.parser import HTMLParser

import pytest

from mhmoe_ray.errors import DataError, RunError
from mhmoe_ray.evaluate.request import EvalRequest, Evaluation, RoutingCounts, all_stored, store
from mhmoe_ray.evaluate.score import Score
from mhmoe_ray.planner.sizes import flops_per_token
from mhmoe_ray.report.figures import RunFigures
from mhmoe_ray.report.page import write_report
from mhmoe_ray.report.plots import differences
from mhmoe_ray.report.variants import Variant, losses_at, matched_step, variants, verdict
from mhmoe_ray.runs import events, history, metrics
from mhmoe_ray.runs.directory import Attempt, RunDir, add_attempt, create_run, mark_imported
from mhmoe_ray.spec import DataSpec
from tests.specs import tiny_spec

pytestmark = pytest.mark.long

MOE = {"heads": 2, "experts": 4, "top_k": 2, "d_expert": 24}


def made(
    folder,
    name,
    seed,
    final,
    moe=MOE,
    steps=20,
    validated=5,
    micro_batches=4,
    speed=100.0,
    balance=1.0,
    over="finished",
) -> RunDir:
    """Write a run whose validation loss comes down to `final` at step 20, and return it."""
    spec = tiny_spec(folder, model={"moe": moe}, train={"micro_batches": micro_batches})
    spec = spec.model_copy(update={"name": f"sweep-{name}-s{seed}", "seed": seed})
    run = create_run(spec)
    add_attempt(run, Attempt(f"{run.id}-1", "http://127.0.0.1:1", local=True))
    for step in range(1, steps + 1):
        line = {metrics.STEP: step, metrics.TIME: 1000.0 + step, metrics.LOSS: final + 1 / step, metrics.GROUP: 1}
        line |= {metrics.TOKENS: 128 * step, metrics.TOKENS_PER_S: speed + step}
        if moe:
            line |= {metrics.BALANCE: balance + 1 / step, metrics.ENTROPY: 0.9, metrics.DROPPED: 0.0}
        if step % validated == 0:
            line[metrics.VAL_LOSS] = final + (20 - step) / 20
        history.append(run, line)
    history.flush(run)
    if moe:
        counts = {"step": steps, "routes_per_layer_and_expert": [[10, 20, 30, 40]]}
        (run.routing / f"step_{steps:08d}.1.json").write_text(json.dumps(counts))
    if over:
        events.record(run, over, **({"reason": "its end"} if over == "failed" else {"step": steps}))
    return run


def six(folder):
    losses = {"dense": (3.0, 3.1, 3.2), "mhmoe-h2": (2.9, 2.98, 3.11)}
    return [
        made(folder, name, seed, loss, moe=None if name == "dense" else MOE)
        for name, values in losses.items()
        for seed, loss in enumerate(values)
    ]


def read(runs):
    return variants([RunFigures.read(run) for run in runs])


def test_runs_that_differ_in_their_seed_alone_are_one_variant(tmp_path):
    found = read([*six(tmp_path), made(tmp_path, "other", 0, 2.0, moe={**MOE, "top_k": 1})])
    assert [(v.name, len(v.runs)) for v in found] == [("dense", 3), ("mhmoe-h2", 3), ("other", 1)]
    assert matched_step(found) == 20
    assert found[0].mean_loss(20) == pytest.approx(3.1)
    assert found[0].deviation(20) == pytest.approx(0.1)
    assert found[2].deviation(20) is None


def test_runs_that_are_spread_in_different_ways_by_name_are_what_is_compared(tmp_path):
    runs = [
        made(tmp_path, name, seed, 3.0, speed=speed)
        for name, speed in (("ddp", 100.0), ("fsdp", 50.0))
        for seed in (0, 1)
    ]
    for run in runs[2:]:
        spec = run.spec()
        run.write_spec(spec.model_copy(update={"cluster": spec.cluster.model_copy(update={"strategy": "fsdp"})}))
    found = read(runs)
    assert [(v.name, len(v.runs), v.tokens_per_s) for v in found] == [("ddp", 2, 110.5), ("fsdp", 2, 60.5)]
    other = made(tmp_path, "ddp", 2, 3.0)
    spec = other.spec()
    other.write_spec(spec.model_copy(update={"cluster": spec.cluster.model_copy(update={"ep": 1})}))
    assert [len(v.runs) for v in read([*runs[:2], other])] == [3]  # of one name: where each ran is no matter


def test_an_unfinished_run_does_not_count_beside_a_finished_one(tmp_path):
    [variant] = read([made(tmp_path, "a", 0, 3.0), made(tmp_path, "a", 1, 9.0, steps=10)])
    assert variant.losses(20) == {0: 3.0}
    [alone] = read([made(tmp_path, "b", 1, 9.0, steps=10)])
    assert len(alone.runs) == 1


def test_a_seed_that_did_not_get_to_the_end_is_named(tmp_path):
    lost = made(tmp_path, "dense", 3, 3.0, steps=15)
    events.record(lost, "failed", reason="training: the gradient is not finite")
    write_report([*six(tmp_path), lost], tmp_path / "out")
    page = " ".join((tmp_path / "out" / "report.html").read_text().split())
    assert f"as others did:</strong> {lost.id} (failed)." in page


def test_what_just_began_or_gave_up_does_not_move_the_step_at_which_others_are_compared(tmp_path):
    """Such runs do not blank the verdict either; a run that goes on is compared as far as it got."""
    other = {**MOE, "top_k": 1}
    began = made(tmp_path, "began", 0, 3.0, moe={**MOE, "top_k": 3}, steps=3, over=None)
    failed = made(tmp_path, "failed", 0, 3.0, moe={**MOE, "top_k": 4}, steps=10, over="failed")
    runs = [*six(tmp_path), made(tmp_path, "b", 0, 3.0, moe=other), began, failed]
    verdicts = write_report(runs, tmp_path / "out")
    assert [(v.other, v.step) for v in verdicts] == [("mhmoe-h2", 20), ("b", 20)]
    page = " ".join((tmp_path / "out" / "report.html").read_text().split())
    assert f"as others did:</strong> {failed.id} (failed)." in page
    assert '<td>began</td><td data-label="loss"></td>' in page
    goes_on = made(tmp_path, "on", 0, 3.0, moe={**MOE, "top_k": 4}, steps=10, over=None)
    verdicts = write_report([*six(tmp_path), goes_on], tmp_path / "out")
    assert [(v.other, v.step) for v in verdicts] == [("mhmoe-h2", 10), ("on", 10)]


def test_of_two_runs_of_a_seed_the_newer_counts_and_the_other_is_named(tmp_path):
    runs = [made(tmp_path, "a", 0, 3.0), made(tmp_path, "a", 1, 3.1)]
    again = made(tmp_path, "again", 0, 4.0)
    for given in ([*runs, again], [again, *runs]):
        [variant] = read(given)
        assert variant.losses(20) == {0: 4.0, 1: 3.1}
        assert len(variant.runs) == 2
    write_report([*runs, again], tmp_path / "out")
    page = " ".join((tmp_path / "out" / "report.html").read_text().split())
    assert f"a newer run is of the same seed:</strong> {runs[0].id} (seed 0)." in page
    early = [made(tmp_path, "b", 0, 3.0, moe={**MOE, "top_k": 1}, steps=10, over=None) for _ in range(2)]
    write_report(early, tmp_path / "out")
    page = " ".join((tmp_path / "out" / "report.html").read_text().split())
    assert f"a newer run is of the same seed:</strong> {early[0].id} (seed 0)." in page
    assert "did not get to the end" not in page


def test_runs_on_other_held_out_text_are_no_seeds_of_one_variant_and_said_to_be_unequal(tmp_path):
    runs = [made(tmp_path, "a", seed, 3.0) for seed in (0, 1)]
    for run, tokens in zip(runs, (130_950, 130_853), strict=True):
        figures = {"unigram_entropy": 6.5, "bigram": 4.4, "bigram_tokens": 20_000}
        events.record(run, "prepared", validation_tokens=tokens, **figures)
    assert [len(v.runs) for v in read(runs)] == [1, 1]
    write_report(runs, tmp_path / "out")
    assert "They differ in held-out text or tokenizer</strong>" in (tmp_path / "out" / "report.html").read_text()


def test_trainings_of_other_lengths_are_said_to_be_unequal(tmp_path):
    runs = [made(tmp_path, "a", 0, 3.0), made(tmp_path, "b", 0, 3.0)]
    spec = runs[1].spec()
    shorter = spec.train.model_copy(update={"steps": spec.train.steps - 1})
    runs[1].write_spec(spec.model_copy(update={"train": shorter}))
    write_report(runs, tmp_path / "out")
    assert "They differ in the number of steps" in (tmp_path / "out" / "report.html").read_text()


def test_minutes_are_those_in_which_workers_ran(tmp_path):
    run = made(tmp_path, "a", 0, 3.0, steps=10)
    for step in (9, 10, 11):  # three days later, from a checkpoint at 8
        line = {metrics.STEP: step, metrics.TIME: 300_000.0 + step, metrics.LOSS: 3.0, metrics.GROUP: 2}
        history.append(run, {**line, metrics.TOKENS: 128 * step, metrics.TOKENS_PER_S: 100.0})
    history.flush(run)
    assert RunFigures.read(run).seconds == 7 + 2


def test_training_flops_are_those_of_the_plan(tmp_path):
    run = RunFigures.read(made(tmp_path, "a", 0, 3.0))
    assert run.flops(1000) == 1000 * flops_per_token(run.spec.model, 16).training
    assert run.tokens_per_s == 110.5


def test_what_diverged_or_has_no_numbers_is_left_out_and_named(tmp_path):
    runs = [*six(tmp_path), made(tmp_path, "nan", 0, math.nan), made(tmp_path, "waiting", 0, 3.0, steps=0)]
    verdicts = write_report(runs, tmp_path / "out")
    assert [(v.other, v.step) for v in verdicts] == [("mhmoe-h2", 20)]
    page = " ".join((tmp_path / "out" / "report.html").read_text().split())
    assert f"not finite:</strong> {runs[6].id}." in page
    assert f"no numbers yet: {runs[7].id}." in page


def test_runs_that_all_diverged_are_compared_and_not_said_to_be_left_out(tmp_path):
    runs = [made(tmp_path, "a", 0, math.nan), made(tmp_path, "b", 0, math.nan, moe={**MOE, "top_k": 1})]
    write_report(runs, tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "The last validation of none of them is finite" in page
    assert "Left out" not in page


def test_a_baseline_that_diverged_is_said_to_have(tmp_path):
    runs = [*six(tmp_path), made(tmp_path, "nan", 0, math.nan, moe={**MOE, "top_k": 1})]
    with pytest.raises(RunError, match="baseline nan: the last validation of its runs is not finite; choose from d"):
        write_report(runs, tmp_path / "out", baseline="nan")


def test_a_baseline_that_gave_up_is_said_to_have(tmp_path):
    runs = [*six(tmp_path), made(tmp_path, "early", 0, 3.0, moe={**MOE, "top_k": 1}, steps=10, over="failed")]
    with pytest.raises(RunError, match="baseline early: its runs did not get to the end as others did; choose from d"):
        write_report(runs, tmp_path / "out", baseline="early")


def test_unequal_trainings_are_said_to_be(tmp_path):
    runs = [made(tmp_path, "a", 0, 3.0), made(tmp_path, "b", 0, 3.0, micro_batches=8)]
    write_report(runs, tmp_path / "out")
    assert "<strong>They differ in tokens in a step</strong>" in (tmp_path / "out" / "report.html").read_text()


def test_a_verdict_is_students_t_over_pairs_of_seeds(tmp_path):
    dense, mhmoe = read(six(tmp_path))
    found = verdict(dense, mhmoe, 20)
    differences = [-0.1, -0.12, -0.09]
    mean = sum(differences) / 3
    deviation = math.sqrt(sum((d - mean) ** 2 for d in differences) / 2)
    half = 4.302653 * deviation / math.sqrt(3)  # t of 97.5 per cent, 2 degrees of freedom
    assert found.difference == pytest.approx(mean)
    assert (found.low, found.high) == pytest.approx((mean - half, mean + half), abs=1e-6)
    assert found.is_clear
    assert found.paired
    assert found.said.startswith("mhmoe-h2 to dense: 0.1033 nats lower, perplexity 9.8% lower (95% interval -0.1413")


def test_losses_are_paired_over_two_common_seeds_or_all_that_one_has(tmp_path):
    dense, mhmoe = read(six(tmp_path))
    two = losses_at(20, dense, Variant("two", mhmoe.runs[1:]))
    assert two.paired
    assert two.differences == pytest.approx([-0.12, -0.09])
    single = losses_at(20, dense, Variant("single", mhmoe.runs[:1]))
    assert single.paired
    assert single.differences == pytest.approx([2.9 - 3.0])
    first, last = Variant("first", dense.runs[:2]), Variant("last", mhmoe.runs[1:])
    one = losses_at(20, first, last)
    assert not one.paired
    assert one.differences == pytest.approx([2.98 - 3.05, 3.11 - 3.05])
    [axis] = differences([first, last], first).axes
    assert axis.lines[1].get_ydata()[-1] == pytest.approx(verdict(first, last, 20).difference)


def test_speed_and_balance_on_the_page_are_means_over_the_runs(tmp_path):
    of_seed = [(1000.0, 1.0), (2000.0, 1.1), (6000.0, 1.5)]
    runs = [made(tmp_path, "a", seed, 3.0, speed=speed, balance=b) for seed, (speed, b) in enumerate(of_seed)]
    [variant] = read(runs)
    assert variant.tokens_per_s == pytest.approx(3010.5)
    assert variant.late(metrics.BALANCE) == pytest.approx(1.2 + (1 / 19 + 1 / 20) / 2)
    assert variant.late(metrics.MFU) is None
    write_report(runs, tmp_path / "out")
    assert '<td data-label="tokens/s">3,010</td>' in (tmp_path / "out" / "report.html").read_text()


def test_seeds_that_only_one_has_are_left_out_and_one_seed_tells_nothing(tmp_path):
    dense, mhmoe = read(six(tmp_path))
    two = verdict(dense, Variant("two", mhmoe.runs[1:]), 20)
    assert (two.seeds, two.paired) == (2, True)
    assert two.difference == pytest.approx(-0.105)
    one = verdict(dense, Variant("one", mhmoe.runs[:1]), 20)
    assert (one.low, one.is_clear) == (None, False)
    assert "nobody knows how sure" in one.said
    assert verdict(dense, mhmoe, 19) is None


def store_evaluation(run, tokens_of, distinct, step=20, **asked):
    counts = RoutingCounts(
        tokens=100,
        counts=[[100] * 4],
        tokens_of=[tokens_of],
        distinct=[distinct],
        agreement=[[[100, 10], [10, 100]]],
        first_weight=[80.0],
    )
    none = {"prepared": None, "text": None, "samples": 0, "tasks": [], "task_folders": [], "limit": None}
    how = {"batch": 8, "half": False, "cpus": 1, "gpus": 0}
    named = {"run": str(run.path), "checkpoint": f"step_{step:08d}.1"}
    request = EvalRequest(**named, **how, **(none | (asked or {"prepared": "/data"})))
    score = Score(nats=300.0, tokens=100, text_bytes=400)
    answer = {"domains": {"a": score}, "languages": {}, "routing": {"a": counts}, "tasks": {}}
    store(run, Evaluation(request=request, step=step, tokens=2560, seconds=1.0, **answer))


def test_loads_are_said_to_be_those_of_training_where_only_other_texts_were_counted(tmp_path):
    runs = [made(tmp_path, "a", 0, 3.0), made(tmp_path, "b", 0, 3.0, moe={**MOE, "top_k": 1})]
    store_evaluation(runs[0], [60] * 4, [0, 0, 0, 60, 40])
    text = DataSpec.model_validate({"sources": {"own": {"path": "own.txt"}}, "prepared": "none", "seq_len": 16})
    store_evaluation(runs[1], [60] * 4, [0, 60, 40], text=text)
    write_report(runs, tmp_path / "out")
    assert '<p class="small">Loads of b are those of training.' in (tmp_path / "out" / "report.html").read_text()


def test_bits_per_byte_are_of_one_step_which_is_named_where_losses_are_of_another(tmp_path):
    runs = [made(tmp_path, "a", seed, 3.0) for seed in (0, 1)]
    page = tmp_path / "out" / "report.html"
    expected = 300 / math.log(2) / 400
    for steps, shown in (((10, 20), ""), ((10, 10), f"{expected:.4f}, step 10"), ((20, 20), f"{expected:.4f}")):
        for run, step in zip(runs, steps, strict=True):
            for old in run.evaluations.glob("*"):
                old.unlink()
            store_evaluation(run, [60] * 4, [0, 0, 0, 60, 40], step=step)
        write_report(runs, tmp_path / "out")
        assert f'<td data-label="bits/byte">{shown}</td>' in page.read_text()


def test_of_evaluations_of_one_step_the_last_by_name_is_the_newest(tmp_path):
    run = made(tmp_path, "a", 0, 3.0)
    for n in range(20):
        store_evaluation(run, [60] * 4, [0, 0, 0, 60, 40], prepared=f"/data/{n}")
    found = [evaluation.request.key for evaluation in all_stored(run)]
    assert found == sorted(found)


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.outside = []

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        self.outside += [v for k, v in named.items() if k in ("src", "href", "xlink:href")]


def test_the_page_needs_nothing_else_and_the_pictures_lie_beside_it(tmp_path):
    runs = [*six(tmp_path), made(tmp_path, "top-1", 0, 3.0, moe={**MOE, "top_k": 1})]
    store_evaluation(runs[3], tokens_of=[60] * 4, distinct=[0, 0, 0, 60, 40])
    store_evaluation(runs[6], tokens_of=[60, 60, 60, 0], distinct=[0, 100, 0])
    verdicts = write_report(runs, tmp_path / "out", baseline="mhmoe-h2")
    assert [v.other for v in verdicts] == ["dense", "top-1"]
    page = (tmp_path / "out" / "report.html").read_text()
    links = Links()
    links.feed(page)
    assert [link for link in links.outside if not link.startswith(("#", "data:"))] == []
    assert "<script" not in page
    use = "top-1 has, beside mhmoe-h2, fewer at 0.001 (75.0% to 100.0%), 0.002"
    for part in (verdicts[0].said, "h 2, E 4, k 2, f 24", "model.moe.heads", "85.0%", "10.0%", use):
        assert part in page, part
    pictures = {p.stem for p in (tmp_path / "out").glob("*.png")}
    assert {"loss_by_steps", "loss_by_flops", "loss_beside_baseline", "activation", "load_mhmoe_h2"} <= pictures
    assert page.count("<figure") == len(pictures)
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in (tmp_path / "out").glob("*.png"))
    assert "dropped" not in pictures  # nothing was


def test_a_loss_whose_perplexity_no_float_holds_is_reported(tmp_path):
    runs = [made(tmp_path, "a", seed, 3.0 + seed / 10) for seed in (0, 1)]
    runs += [made(tmp_path, "b", seed, 800.0 + seed, moe={**MOE, "top_k": 1}) for seed in (0, 1)]
    [found] = write_report(runs, tmp_path / "out")
    assert found.said.startswith("b to a: 797.4500 nats higher (")


def test_use_of_experts_is_compared_threshold_by_threshold():
    from mhmoe_ray.report.figures import Routes, compared_use

    def routes(*activated):
        return Routes(None, "", [*activated, *([0.0] * (9 - len(activated)))], [], None, None)

    assert compared_use("smoe", "mhmoe", routes(1.0, 0.5), routes(1.0, 0.5)) == (
        "mhmoe has as many of its experts in use as smoe at every threshold"
    )
    assert compared_use("smoe", "mhmoe", routes(1.0, 0.5, 0.5), routes(1.0, 0.75, 0.25)) == (
        "mhmoe has, beside smoe, more at 0.002 (75.0% to 50.0%) and fewer at 0.005 (25.0% to 50.0%) of its experts in "
        "use, and else as many"
    )
    assert compared_use("smoe", "mhmoe", Routes(None, "", None, [], None, None), routes(1.0)) is None


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"report .*file/out: Not a directory; name a folder you can write"):
        write_report(six(tmp_path), tmp_path / "file" / "out")


def test_mistakes(tmp_path):
    imported = RunDir(tmp_path / "imported-000000")
    imported.path.mkdir()
    mark_imported(imported)
    with pytest.raises(RunError, match="run imported-000000: it was imported"):
        write_report([imported], tmp_path / "out")
    with pytest.raises(RunError, match="choose from dense, mhmoe-h2"):
        write_report(six(tmp_path), tmp_path / "out", baseline="smoe")
    with pytest.raises(RunError, match="none of the runs has numbers yet"):
        write_report([made(tmp_path, "a", 0, 3.0, steps=0)], tmp_path / "out")


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
        made(tmp_path, name, s, 3.0 - 0.1 * s, moe=moe) for name, moe in zip(names, moes, strict=True) for s in (0, 1)
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


def test_one_validation_is_a_number_and_no_curve(tmp_path):
    write_report([made(tmp_path, "a", 0, 3.0, validated=20)], tmp_path / "report")
    assert not list((tmp_path / "report").glob("loss_by_*.png"))
    assert "20.09" in (tmp_path / "report" / "report.html").read_text()
