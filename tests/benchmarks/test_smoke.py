"""Every benchmark runs, in small, and finds the server's promises kept. Nothing here looks at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import ablations, backbone, criteria, int8, precision
from tests.server.engines.tensorrt.half_graphs import half_graph
from tests.server.engines.tensorrt.tiny_bundle import write_bundle

Run = Callable[..., dict[str, Any]]

with_wrk = pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed (apt-get install wrk)")


@with_wrk
def test_throughput_compares_the_server_with_the_raw_loop(run: Run) -> None:
    results = run("throughput", "--rounds", "1", "--seconds", "0.4", "--settle", "0.2", "--clients", "4")
    assert results["broken"] == []
    figures = results["figures"]
    assert len(figures["ratios"]) == 1
    assert figures["ratio_median"] > 0
    assert figures["fill_stage1"] >= 1
    assert sum(figures["mix"]) == pytest.approx(1)
    assert sum(figures["raw_mix"]) == pytest.approx(1)


@with_wrk
def test_host_cpu_is_split_by_thread(run: Run) -> None:
    results = run("host_cpu", "--seconds", "0.4", "--settle", "0.2", "--clients", "4")
    assert results["broken"] == []
    by_thread = results["figures"]["cpu_us_by_thread"]
    assert all(by_thread[group] > 0 for group in ("loop", "executor", "decode"))


@with_wrk
def test_the_driver_is_compared_with_wrk(run: Run) -> None:
    figures = run("driver", "--seconds", "1", "--rounds", "1", "--processes", "1")["figures"]
    for name in ("dvt_bench_1", "wrk"):
        assert figures[f"{name}_per_s"][0] > 0
        assert figures[f"{name}_cpu_us"][0] > 0


@with_wrk
def test_front_ends_are_compared_with_one_process(run: Run) -> None:
    results = run(
        "frontends", "--rounds", "1", "--seconds", "0.3", "--settle", "0.2", "--images", "4", "--front-ends", "0", "1"
    )
    assert results["broken"] == []
    assert results["figures"]["0"]["front ends"] == 0
    assert results["figures"]["1"]["front ends"] > 0


def test_a_link_is_flooded(run: Run) -> None:
    results = run("flooded_link", "--rounds", "1", "--count", "200")
    assert results["broken"] == []
    assert results["figures"]["loop_cpu_us"] > 0


def test_a_lone_request_is_compared_with_the_bare_engine(run: Run) -> None:
    results = run("latency", "--requests", "20")
    assert results["broken"] == []
    assert results["figures"]["requests"] == 20


def test_swaps_fail_no_request_and_mix_no_thresholds(run: Run) -> None:
    results = run("swaps", "--swaps", "10", "--clients", "4", "--answers", "4")
    assert results["broken"] == []
    figures = results["figures"]
    assert figures["swaps"] == 10
    assert figures["answers"] >= 40
    assert figures["telling"] > 0, "no image would have told a mixed answer"


def test_a_fleet_agrees_again_whatever_its_api_server_does(run: Run) -> None:
    results = run("fleet", "--watchers", "3", "--puts", "4", "--away", "0.1", "--watch", "1", "--rounds", "1")
    assert results["broken"] == []
    assert results["figures"]["watchers"] == 3


def test_clients_that_hang_up_leave_nothing_behind(run: Run) -> None:
    results = run("hangups", "--hangups", "20", "--at-once", "4", "--clients", "2", "--alone", "10")
    assert results["broken"] == []
    assert results["figures"]["before_answer"] + results["figures"]["after_answer"] == 20


def test_sigterm_leaves_no_accepted_request_unanswered(run: Run) -> None:
    results = run("drain", "--trials", "1", "--clients", "6", "--answers", "20")
    assert results["broken"] == []
    assert results["figures"]["answers"]["200"] > 0


def test_a_rolling_update_fails_no_request(run: Run) -> None:
    short = ("--variants", "both", "--prestop", "0.5", "--drain-delay", "2", "--lag", "0.1", "--min-ready", "0.3")
    results = run("rolling_update", *short, "--clients", "4")
    assert results["broken"] == []
    assert results["figures"]["both_requests"] > 20


def test_slow_clients_are_closed_and_others_asked_beside_them(run: Run) -> None:
    short = ("--connections", "4", "--seconds", "0.5", "--rate", "20", "--pause", "0.1", "--pipelined", "20")
    figures = run("slow_clients", "--kinds", "header", "deaf", *short, "--setting", "header_timeout_s=0.2")["figures"]
    assert figures["header_never_closed"] == {"header": 0}
    assert figures["header_statuses"]["408"] >= 4
    assert figures["header_lost"] == figures["header_refused"] == 0
    assert figures["deaf_p99_ratio"] > 0


def test_floods_are_over_soon_and_leave_the_server_standing(run: Run) -> None:
    short = ("--mib", "1", "--trailers-mib", "1", "--pipelined-mib", "1", "--connections", "2", "--seconds", "1")
    results = run("floods", *short)
    assert results["broken"] == []
    assert len(results["table"]) == 11


def test_a_checkout_is_held_against_this_one(run: Run) -> None:
    root = str(Path(__file__).resolve().parents[2])
    results = run(
        "checkouts", root, *["--rounds", "1", "--lone", "5", "--seconds", "0.3", "--clients", "2", "--each", "3"]
    )
    assert results["broken"] == []
    assert results["figures"]["lone_ratio"] > 0


def test_previews_are_asked_for_beside_others(run: Run) -> None:
    short = ("--records", "300", "--window", "40", "--lone", "8", "--seconds", "0.3", "--rate", "20")
    results = run("previews", *short, "--before", str(Path(__file__).resolve().parents[2]))
    assert results["broken"] == []
    assert results["figures"]["before_300_records_more_ms"] != results["figures"]["now_300_records_more_ms"]
    assert results["figures"]["now_300_records_previews_per_s"] > 0


def test_hostile_files_get_what_their_manifest_expects(run: Run, tmp_path: Path) -> None:
    from server.bench.photos import photo

    folder = tmp_path / "files"
    (folder / "broken").mkdir(parents=True)
    (folder / "good.jpg").write_bytes(photo(0))
    (folder / "broken" / "cut.jpg").write_bytes(photo(0)[:2000])
    (folder / "broken" / "text.bin").write_bytes(b"no image")
    manifest = folder / "MANIFEST.csv"
    manifest.write_text("path,expect\ngood.jpg,decode\nbroken/cut.jpg,clean 4xx\nbroken/text.bin,clean 415/422\n")
    results = run("hostile", "--alone", "5", str(folder), "--manifest", str(manifest))
    assert results["broken"] == []
    assert results["figures"]["statuses"]["decode"] == {"200": 1}
    assert results["figures"]["files"] == 3


def test_a_bundle_that_is_there_is_only_looked_at(run: Run) -> None:
    results = run("build_bundle")
    assert sum(results["figures"]["mix"]) == pytest.approx(1)


def test_results_tell_machine_versions_and_command_but_no_path(run: Run, tmp_path: Path) -> None:
    results = run("build_bundle")
    assert results["command"].startswith("python -m benchmarks.build_bundle --bundle bundle")
    assert str(tmp_path.parent) not in str(results)
    assert results["versions"]["python"]
    assert results["machine"]["usable_cores"] >= 1


def test_engines_are_built_with_one_size_and_with_several(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed: no real engine is built")
    bundle = write_bundle(tmp_path / "half", graphs=half_graph)
    figures = run("engine_builds", str(bundle.path), "--target", "sm89", "--sizes", "1", "1,4")["figures"]
    assert figures["gpu"] == "sm89"
    (builds,) = figures["builds"].values()
    assert [[stage["bytes"] > 1000 for stage in builds[sizes]] for sizes in ("1", "1,4")] == [[True] * 3] * 2
    assert not (bundle.path / "engines").exists()


def test_savings_change_no_logits(run: Run) -> None:
    results = run("savings", "--variant", "micro", "--rounds", "2")
    figures = results["figures"]
    assert figures["stage3_batch4_logits"] <= 1e-5
    assert figures["stage3_batch1_class_row_ratio"] > 0


def test_stages_are_held_against_what_a_core_can_multiply(run: Run, micro_bundle: Path) -> None:
    older = micro_bundle.parent
    assert micro_bundle.name == "micro"
    figures = run("cpu_peak", "--variants", "micro", "--rounds", "2", "--before", str(older))["figures"]
    for which in ("before", "now"):
        assert 0 < figures[f"micro_stage3_threads2_{which}_of_peak"] < 1
        assert figures[f"micro_threads1_{which}_images_s"] > 0
        assert 10 < figures[f"micro_{which}_resident_mb"] < 1000
    assert figures["micro_logits"] <= 1e-4


def test_solvers_are_compared_and_none_beats_the_exact_one(run: Run) -> None:
    figures = run("solvers", "--sizes", "400")["figures"]
    for name in ("logged", "synthetic_400"):
        for solver in ("sweep", "geometric", "genetic"):
            pairs = zip(figures[f"{name}_{solver}"], figures[f"{name}_exact"], strict=True)
            assert all(a <= b + 1e-9 for a, b in pairs if a == a and b == b), solver


def test_ablations_train_judge_and_tell(image_folder: Path, tmp_path: Path) -> None:
    runs, out = tmp_path / "runs", tmp_path / "out"
    arguments = [str(image_folder), str(image_folder), str(runs), "--recipe", "micro", "--epochs", "1"]
    arguments += ["--out", str(out)]
    assert ablations.main([*arguments, "--tables", "reuse", "--seeds", "1"]) == 0
    reuse = json.loads((out / "ablations.json").read_text())["tables"]["reuse"]
    assert set(reuse["rows"]) == {"none", "features", "relations", "both"}
    assert reuse["rows"]["none"]["mmacs"][-1] < reuse["rows"]["both"]["mmacs"][-1]
    assert reuse["noise"] is None, "a single seed tells nothing of chance"

    arguments += ["--tables", "relation-designs", "--seeds", "2"]
    assert ablations.main([*arguments, "--minutes", "0"]) == 0
    assert not list(runs.glob("two-exits*")), "no run is begun when the time is up"
    assert ablations.main(arguments) == 0
    tables = json.loads((out / "ablations.json").read_text())["tables"]
    assert tables["reuse"] == reuse, "a table that was not asked for stays"
    designs = tables["relation-designs"]
    assert list(designs["rows"]) == ["without", *ablations._RELATIONS]
    for row in designs["rows"].values():
        assert len(row["mmacs"]) == len(row["exits"]) == 2
        assert len(row["exits_by_seed"]) == 2
        assert row["exits"][1][0] == pytest.approx(sum(exits[1] for exits in row["exits_by_seed"]) / 2, abs=0.01)
    assert designs["rows"]["without"]["mmacs"][-1] == min(row["mmacs"][-1] for row in designs["rows"].values())
    text = (out / "ablations.md").read_text()
    assert "Table 6" in text
    written = {run: (run / "model.safetensors").stat().st_mtime_ns for run in runs.iterdir()}
    assert ablations.main([*arguments, "--minutes", "0"]) == 0, "finished runs are not repeated"
    assert {run: (run / "model.safetensors").stat().st_mtime_ns for run in runs.iterdir()} == written
    assert (out / "ablations.md").read_text() == text


def test_chance_is_told_from_what_rows_do() -> None:
    def rows(*last: tuple[float, ...]) -> dict[str, dict[str, Any]]:
        return {str(at): {"exits_by_seed": [[50.0, each] for each in row]} for at, row in enumerate(last)}

    same = ablations._noise(rows((50.0, 52.0, 51.0), (52.0, 51.0, 50.0), (51.0, 50.0, 52.0)))
    assert same == {"range": 0.0, "chance": 1.0}
    apart = ablations._noise(rows((50.0, 52.0, 51.0), (60.0, 62.0, 61.0), (70.0, 72.0, 71.0)))
    assert apart["range"] == 20.0
    assert apart["chance"] == pytest.approx(6 / 6**3, abs=0.01)  # all seeds in the same order, of 6


def test_criteria_are_compared_at_the_same_cost(image_folder: Path, micro_checkpoint: Path, tmp_path: Path) -> None:
    backbone = {"figures": {"seed0_alone_accuracy": 0.3, "seed0_alone_mmacs": 100.0}}
    (tmp_path / "backbone.json").write_text(json.dumps(backbone))
    arguments = [str(image_folder), str(image_folder), "--checkpoint", str(micro_checkpoint), "--held-out", "0.25"]
    arguments += [
        "--draws",
        "20",
        "--seeds",
        "5",
        "--backbone",
        str(tmp_path / "backbone.json"),
        "--out",
        str(tmp_path),
    ]
    assert criteria.main(arguments) == 0
    figures = json.loads((tmp_path / "criteria.json").read_text())["figures"]
    for name in ("max_probability", "entropy", "margin"):
        assert all(0 < accuracy < 1.001 for accuracy in figures[f"{name}_accuracy"])
        assert 0 < figures[f"{name}_area"] < 1.001
        assert figures[f"{name}_ratio"] > 0
    assert len(figures["lot_accuracy"]) == 3
    low, high = figures["margin_area_gain_interval"]
    assert low <= high


def test_a_dvt_is_compared_with_its_backbone_trained_alone(image_folder: Path, tmp_path: Path) -> None:
    arguments = [str(image_folder), str(image_folder), str(tmp_path / "runs"), "--recipe", "micro", "--epochs", "1"]
    assert backbone.main([*arguments, "--out", str(tmp_path)]) == 0
    figures = json.loads((tmp_path / "backbone.json").read_text())["figures"]
    last = figures["seed0_exit_mmacs"][-1] - figures["seed0_exit_mmacs"][-2]
    assert 0 < figures["seed0_alone_mmacs"] < last, "alone, the last stage reuses nothing"
    ratio = figures["seed0_read_ratio"]
    assert ratio is None or ratio == pytest.approx(figures["seed0_alone_mmacs"] / figures["seed0_read_mmacs"])


def test_a_cost_is_read_off_the_curve_between_its_points() -> None:
    points = [(1.0, 0.5), (2.0, 0.7), (3.0, 0.6), (4.0, 0.8)]
    assert backbone.cost_of(0.4, points) == 1.0
    assert backbone.cost_of(0.6, points) == pytest.approx(1.5)
    assert backbone.cost_of(0.75, points) == pytest.approx(3.5)
    assert backbone.cost_of(0.9, points) is None


def test_the_live_server_is_held_against_the_simulator(run: Run) -> None:
    figures = run("goodput", "simulator", "--seconds", "0.5", "--rounds", "1", "--steps", "1")["figures"]
    assert len(figures["live"]) == 1
    assert all(rate > 0 for rate in figures["simulated"])


def test_an_overload_is_told_by_its_outcomes(run: Run) -> None:
    short = ("--seconds", "0.3", "--rounds", "1", "--steps", "1", "--deadline-ms", "2000")
    results = run("goodput", "overload", *short, "--together", "3", "--executors", "1")
    outcome = results["figures"]["x2_brownout"]
    assert outcome["images"] > 10
    assert outcome["images"] % 3 == 0
    assert outcome["in_time"] + outcome["refused"] <= 1


def test_ways_to_serve_are_compared_in_turn(run: Run) -> None:
    results = run("goodput", "policies", "--seconds", "0.3", "--rounds", "1", "--steps", "1", "--deadline-ms", "2000")
    assert {"server_rates", "no_exit_rates", "fixed_delay_2_ms_rates"} <= results["figures"].keys()


def test_deciding_costs_little_more_with_many_queued_and_no_swap_is_torn(run: Run) -> None:
    arguments = ("--queued", "50", "500", "--decide", "300", "--rounds", "1", "--swaps", "300")
    results = run("hot_path", *arguments)
    assert results["broken"] == []
    assert results["figures"]["us_at_500"] > 0
    assert results["figures"]["looked"] > 0


def test_half_precision_is_held_against_fp32(image_folder: Path, micro_checkpoint: Path, tmp_path: Path) -> None:
    arguments = [str(image_folder), str(image_folder), "--checkpoint", str(micro_checkpoint), "--held-out", "0.5"]
    arguments += ["--seeded", "micro", "--photos", "2", "--out", str(tmp_path)]
    assert precision.main(arguments) == 0
    figures = json.loads((tmp_path / "precision.json").read_text())["figures"]
    assert figures["judging"] == 160
    assert 0 < max(figures["fp16_confidence_largest"]) < max(figures["bf16_confidence_largest"]) < 0.1
    assert max(figures["fp16_in_ONNX_Runtime_confidence_largest"]) < 0.01
    assert figures["fp16_with_TF32_confidence_largest"] != figures["fp16_confidence_largest"]
    assert figures["fp16_area"] == pytest.approx(figures["fp32_area"], abs=0.05)
    assert 0 < max(figures["micro_fp16_logits_largest"]) < max(figures["micro_bf16_logits_largest"])
    assert figures["micro_fp16_wrong"] == figures["micro_bf16_wrong"] == 0


def test_integers_are_held_against_fp32(image_folder: Path, micro_checkpoint: Path, tmp_path: Path) -> None:
    arguments = [str(image_folder), str(image_folder), "--checkpoint", str(micro_checkpoint), "--held-out", "0.5"]
    arguments += ["--designs", "uint8", "uint8_7bit"]
    assert int8.main([*arguments, "--scaling", "32", "--rounds", "2", "--out", str(tmp_path)]) == 0
    figures = json.loads((tmp_path / "int8.json").read_text())["figures"]
    assert figures["scaling"] == 32
    assert figures["fp32_depending_rows"] == figures["uint8_depending_rows"] == 0
    for name in ("uint8", "uint8_7bit"):
        assert sum(figures[f"{name}_bytes"]) < sum(figures["fp32_bytes"])
        assert figures[f"{name}_stage3_batch1_ms"] > 0
        assert 0 < max(figures[f"{name}_confidence_mean"]) < 0.1
        assert figures[f"{name}_area"] == pytest.approx(figures["fp32_area"], abs=0.05)
        assert figures[f"{name}_judging_cost_ratio"] > 0
    assert figures["uint8_confidence_mean"] != figures["uint8_7bit_confidence_mean"]


def test_another_runtime_says_what_ours_says(image_folder: Path, micro_checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed (pip install openvino)")
    arguments = [str(image_folder), str(image_folder), "--checkpoint", str(micro_checkpoint), "--held-out", "0.5"]
    arguments += ["--designs", "uint8", "--scaling", "32", "--rounds", "2", "--openvino", "--out", str(tmp_path)]
    assert int8.main(arguments) == 0
    figures = json.loads((tmp_path / "int8.json").read_text())["figures"]
    assert max(figures["openvino_f32_confidence_largest"]) < 1e-4
    assert max(figures["openvino_bf16_confidence_largest"]) < 0.1
    assert figures["openvino_bf16_stage3_batch1_ms"] > 0


def test_a_curve_of_half_the_cost_is_twice_as_cheap() -> None:
    plain = [(1.0, 0.5), (2.0, 0.7), (4.0, 0.8)]
    assert int8.cost_ratio(plain, [(cost / 2, accuracy) for cost, accuracy in plain]) == pytest.approx(2)
    assert int8.cost_ratio(plain, [(0.5, 0.5), (1.0, 0.7)]) == pytest.approx(2), "only where both are"


def test_batch_compares_the_streaming_cascade_with_the_raw_loop(run: Run) -> None:
    results = run("batch", "--rounds", "1", "--seconds", "0.4")
    assert results["broken"] == []
    assert results["figures"]["ratio_pixels_median"] > 0
    assert results["figures"]["cpu_ratio_files_median"] > 0
