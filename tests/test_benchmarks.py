"""The benchmark runs, says what it left out, and computes what it claims to."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fastloss.benchmarks import SUITES, factored_step, gpu, harness, report, roofline
from fastloss.benchmarks.harness import LEFT_TO_FULL, Formula, Provider, Runner, Schedule, Settings, Unavailable

import fastloss
from fastloss.__main__ import main
from fastloss.gaunt.program import Program, Term
from fastloss.gaunt.tables import antipodes

SUITE = SUITES["contrastive"]
PROVIDERS = {provider.name: provider for provider in SUITE.providers}
CASES = {case.name: case for case in SUITE.cases}
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """One run of everything at tiny sizes, as a user starts it."""
    folder = tmp_path_factory.mktemp("reports")
    command = [sys.executable, "-m", "fastloss", "bench", "--smoke", "--threads", "1", "--output", str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    return folder, json.loads((folder / "benchmark.json").read_text()), run.stdout


def test_smoke_covers_every_case_and_provider(smoke):
    _, results, _ = smoke
    assert results["schema"] == harness.SCHEMA
    assert {(row["case"], row["provider"]) for row in results["rows"]} == {
        (case.name, provider.name) for suite in SUITES.values() for case in suite.cases for provider in suite.providers
    }
    for row in results["rows"]:
        assert row["status"] in ("ok", "not available"), row
        assert row["status"] == "ok" or row["detail"]


def test_smoke_rows_are_consistent(smoke):
    _, results, _ = smoke
    flops = {case["name"]: case["flops"] for case in results["cases"]}
    measured = [row for row in results["rows"] if row["status"] == "ok"]
    assert {row["provider"] for row in measured} >= {"fastloss", "fastloss[portable]", "eager", "torch.compile"}
    for row in measured:
        assert row["time"]["q20"] <= row["time"]["median"] <= row["time"]["q80"]
        assert row["time"]["count"] == len(row["seconds"])
        assert row["gflops"] == pytest.approx(flops[row["case"]] / row["time"]["median"] / 1e9)
        assert row["peak_share"] == pytest.approx(row["gflops"] / results["peak_gflops"]["used"])
        assert row["memory"] or row["memory_detail"]
        if row["provider"] == "eager":
            assert row["speedup"]["median"] == 1
            assert row["check"]["gradient_error_over_baseline"] == (None if "forward" in row["case"] else 1)


def test_smoke_writes_markdown_and_plots(smoke):
    folder, results, _ = smoke
    text = (folder / "benchmark.md").read_text()
    for case in results["cases"]:
        assert report.case_heading(case) in text
        assert case["flops_formula"] in text
    drawn = sorted(folder.glob("*.png"))
    assert [path.name for path in drawn] == ["clip-loss-d-256-memory.png", "clip-loss-d-256-time.png"]
    for path in drawn:
        assert path.read_bytes().startswith(PNG)
        assert f"({path.name})" in text
    assert not list(folder.glob(".*")), "temporary files were left behind"


def test_smoke_prints_every_reason(smoke):
    _, results, printed = smoke
    flat = "".join(printed.split())
    for row in results["rows"]:
        if row["status"] != "ok":
            assert "".join(row["detail"].split()) in flat


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "clip-9"], "argument --cases: unknown case clip-9"),
        (["--cases", ","], "argument --cases: no case named"),
        (["--providers", "eager,magic"], "argument --providers: unknown provider magic"),
        (["--threads", "0"], "argument --threads: must be at least 1, got 0"),
        (["--threads", "two"], "argument --threads: expected an integer, got 'two'"),
        (["--seed", "-1"], "argument --seed: must be at least 0, got -1"),
        (["--quick", "--full"], "argument --full: not allowed with argument --quick"),
    ],
)
def test_bad_arguments_exit_with_2_and_name_the_option(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["bench", *arguments])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_output_that_cannot_be_written_is_refused_before_any_work(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as exit_info:
        main(["bench", "--output", str(tmp_path / "file" / "reports")])
    assert exit_info.value.code == 2
    assert f"argument --output: {tmp_path / 'file'} is not a folder" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["rich", "matplotlib"])
def test_missing_dependency_names_the_extra(missing, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["bench", "--smoke", "--output", str(tmp_path / "reports")]) == 1
    assert "pip install 'fastloss[bench]'" in capsys.readouterr().err
    assert not (tmp_path / "reports").exists()


def test_list_names_every_case_and_provider(capsys):
    assert main(["bench", "--list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*CASES, *PROVIDERS))


def test_info_names_the_backends(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert "native: " in printed
    assert "portable: available" in printed


def test_statistics_on_known_numbers():
    assert harness.quantile([3.0], 0.2) == 3.0
    assert harness.quantile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert harness.summarise([0.0, 10.0, 20.0, 30.0, 40.0, 50.0]) == harness.Summary(25.0, 10.0, 40.0, 6)


def test_speedup_pairs_the_rounds():
    # The machine is twice as slow in the second round: the ratio of medians would still be 2, but with a spread.
    assert harness.paired_speedup([2.0, 4.0, 2.0], [1.0, 2.0, 1.0]) == harness.Summary(2.0, 2.0, 2.0, 3)
    assert harness.paired_speedup([2.0, 100.0], [1.0]) == harness.Summary(2.0, 2.0, 2.0, 1)


def test_relative_error():
    truth = torch.tensor([1.0, -4.0], dtype=torch.float64)
    assert harness.relative_error(torch.tensor([1.5, -4.0]), truth) == 0.125
    assert math.isnan(harness.relative_error(torch.tensor([1.5, math.nan]), truth))


def runner(provider, mode="quick", schedule=None, **chosen):
    """A runner of clip-512 at 64 rows with `provider` and the baseline."""
    schedule = schedule or Schedule(rounds=2, memory=frozenset())
    case = replace(CASES["clip-512"].at(rows=64), quick=schedule, full=schedule)
    suite = replace(SUITE, cases=[case], providers=[PROVIDERS["eager"], provider])
    settings = Settings(mode, 0, 1, **chosen)
    return {result.provider: result for result in Runner(suite, settings, lambda text: None).run_case(case)}


def test_wrong_gradients_are_reported_and_not_timed():
    def wrong(image, text, scale):
        return SUITE.truth["clip_loss"](image, text, scale) + 1e-3 * image.sum()

    result = runner(Provider("wrong", "", {"clip_loss": lambda: wrong}))["wrong"]
    assert result.status == "failed"
    assert "differs from dense float64" in result.detail
    assert not result.seconds


def test_nan_is_wrong():
    result = runner(Provider("nan", "", {"clip_loss": lambda: lambda a, b, s: (a.sum() + b.sum() + s) * math.nan}))
    assert result["nan"].status == "failed"


def test_case_beyond_the_memory_limit_is_refused_with_the_computed_size():
    huge = Provider("huge", "", PROVIDERS["eager"].losses, {"clip_loss": Formula("all of it", lambda sizes: 64 << 30)})
    result = runner(huge)["huge"]
    assert result.status == "refused"
    assert "needs 64.0 GiB by the model all of it" in result.detail
    assert result.computed_bytes == 64 << 30


def test_eager_is_refused_at_32768_rows():
    """Four float32 matrices of 32768 x 32768."""
    assert PROVIDERS["eager"].needs(CASES["clip-32768"]) == 4 * 32768**2 * 4 > harness.MEMORY_LIMIT


def test_quick_says_what_it_leaves_to_full_and_a_named_provider_runs():
    late = Provider("late", "", PROVIDERS["eager"].losses, full_only=True)
    assert runner(late)["late"].status == LEFT_TO_FULL
    assert runner(late, mode="full")["late"].status == "ok"
    assert runner(late, providers=frozenset({"late"}))["late"].status == "ok"


def test_provider_that_raises_fails_alone():
    calls = []

    def fragile(image, text, scale):
        calls.append(None)
        if len(calls) > 2:  # one check, one warm-up
            raise RuntimeError("out of luck")
        return SUITE.truth["clip_loss"](image, text, scale)

    results = runner(Provider("fragile", "", {"clip_loss": lambda: fragile}))
    assert results["fragile"].status == "failed"
    assert results["fragile"].detail == "RuntimeError: out of luck"
    assert results["eager"].status == "ok"


def test_absent_package_is_unavailable_with_the_reason():
    def build():
        raise ModuleNotFoundError("No module named 'absent'")

    with pytest.raises(Unavailable, match="No module named 'absent'"):
        Provider("absent", "", {"clip_loss": build}).build("clip_loss")
    with pytest.raises(Unavailable, match="has no nt_xent"):
        Provider("absent", "", {"clip_loss": build}).build("nt_xent")


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize("name", ["eager", "fastloss"])
def test_memory_probe_sees_the_matrix_and_only_where_there_is_one(name):
    case = CASES["clip-sweep-4096"].at(dim=64)
    matrix = 4 * case.sizes["rows"] ** 2
    memory, seconds = harness.probe_memory(case, PROVIDERS[name], seed=0, threads=1)
    assert memory.gradients == 2 * 4 * case.sizes["rows"] * case.sizes["dim"] + 4
    assert memory.extra == memory.growth - memory.gradients
    assert seconds > 0
    if name == "eager":
        assert 3 * matrix < memory.extra < 6 * matrix
    else:
        assert memory.extra < 1.2 * matrix  # kept, as all of up to 256 MiB


def test_inputs_follow_the_seed():
    case = CASES["nt-xent-512"]
    first, again, other = case.inputs(0), case.inputs(0), case.inputs(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert len(first[0]) + len(first[1]) == case.sizes["rows"]


def test_atomic_write_replaces_and_cleans_up(tmp_path, monkeypatch):
    path = tmp_path / "file"
    report.write_atomically(path, b"old")
    report.write_atomically(path, b"new")
    assert path.read_bytes() == b"new"

    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no space"):
        report.write_atomically(path, b"newer")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_units():
    assert [report.duration(s) for s in (1.5, 0.0123, 4.2e-5)] == ["1.5 s", "12.3 ms", "42 µs"]
    assert [report.size(n) for n in (10, 2048, 1020 << 20, 5 << 30)] == ["10 B", "2 KiB", "1020 MiB", "5 GiB"]


@pytest.mark.parametrize(
    ("example", "options"),
    [
        ("shape_matching", ["--steps", "60", "--starts", "16", "--density", "1"]),
        ("digits_generative", ["--steps", "400", "--batch-size", "256", "--slices", "64", "--allowed", "3"]),
    ],
)
def test_sliced_examples_reach_their_goals(example, options, tmp_path):
    script = Path(__file__).parents[1] / "examples" / f"{example}.py"
    command = [sys.executable, str(script), *options, "--output", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "before" in run.stdout
    assert "after" in run.stdout
    assert (tmp_path / f"{example}.png").read_bytes().startswith(PNG)
    assert json.loads((tmp_path / f"{example}.json").read_text())


@pytest.mark.parametrize(
    ("example", "options", "text"),
    [
        ("shape_matching", ["--steps", "1", "--starts", "1"], "failed: the atoms are"),
        ("digits_generative", ["--steps", "1", "--batch-size", "8"], "failed: fastloss: generated digits are"),
        ("digits_generative", ["--batch-size", "100000"], "--batch-size: must be at most the 1347 training images"),
    ],
)
def test_sliced_examples_can_fail(example, options, text):
    script = Path(__file__).parents[1] / "examples" / f"{example}.py"
    run = subprocess.run([sys.executable, str(script), *options], capture_output=True, text=True, timeout=240)
    assert run.returncode != 0
    assert text in run.stderr


def test_digits_example_names_a_bad_batch_size():
    pytest.importorskip("sklearn", reason="the example's digits come with scikit-learn")
    example = Path(__file__).parents[1] / "examples" / "digits_contrastive.py"
    command = [sys.executable, str(example), "--batch-size", "100000"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2
    assert "argument --batch-size: must be at most the 1347 training images" in run.stderr


def test_factored_step_is_measured_beside_the_dense_layers(tmp_path, monkeypatch):
    output = tmp_path / "step.json"
    sizes = [
        "--classes",
        "300",
        "--growth",
        "100",
        "400",
        "--width",
        "8",
        "--batch",
        "4",
        "--rounds",
        "1",
        "--steps",
        "2",
    ]
    monkeypatch.setattr(sys, "argv", ["factored_step", *sizes, "--output", str(output)])
    factored_step.main()
    written = json.loads(output.read_text())
    assert written["machine"]["torch"] == torch.__version__
    names = [set(result["seconds"]) for result in written["results"]]
    alone, beside = {"FactoredOutput"}, {"FactoredOutput", "eager, log-softmax", "eager, Z-loss"}
    assert names == [alone, alone, beside, alone]
    assert all(s["median"] > 0 for result in written["results"] for s in result["seconds"].values())


def test_factored_step_steps_as_the_dense_layer_does():
    hidden, target = torch.randn(5, 6, requires_grad=True), torch.tensor([0, 49, 3, 3, 7])
    linear = torch.nn.Linear(6, 50, bias=False)
    layer = fastloss.FactoredOutput.from_linear(linear, loss="z")
    before = linear.weight.detach().clone()
    factored_step.dense_step(linear, factored_step.dense_z_loss)(hidden, target)
    factored_step.factored_step(layer)(hidden, target)
    moved = linear.weight.detach() - before
    assert moved.abs().max() > 0
    assert (layer.weight() - linear.weight).abs().max() < 1e-2 * moved.abs().max()


@pytest.mark.skipif(sys.platform != "linux", reason="bytes and memory are read from /proc")
def test_benchmark_of_two_processes_runs(tmp_path):
    command = [sys.executable, "-m", "fastloss.benchmarks.distributed", "--timed", "256", "16", "--memory", "256", "16"]
    output = tmp_path / "distributed.json"
    run = subprocess.run(
        [*command, "--rounds", "1", "--output", str(output)], capture_output=True, text=True, timeout=240
    )
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads(output.read_text())
    assert set(report["timed"]["seconds"]) == {
        "one process",
        *(f"two processes, {schedule}" for schedule in ("auto", "all-gather", "ring")),
        "open_clip, two processes",
    }
    assert report["timed"]["speedup_over_one_process"] > 0
    assert report["traffic"]["ring"]["least"] == 2 * 128 * 16 * 4
    assert all(traffic["sent"] > traffic["least"] for traffic in (report["traffic"][s] for s in ("ring", "all-gather")))
    assert len(report["memory"]["extra_bytes_by_rank"]) == 2


@pytest.mark.parametrize(
    ("start", "options"),
    [([], []), (["-m", "torch.distributed.run", "--nproc-per-node", "2"], []), ([], ["--steps", "3"])],
    ids=["alone", "two", "too short to learn"],
)
def test_towers_train_alone_and_in_two_processes(start, options):
    pytest.importorskip("sklearn", reason="the example's digits come with scikit-learn")
    example = Path(__file__).parents[1] / "examples" / "ddp_clip.py"
    run = subprocess.run([sys.executable, *start, str(example), *options], capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "1 process, " in run.stdout
    assert ("largest relative difference of the curves" in run.stdout) == bool(start)


def test_gpu_benchmark_runs_on_the_cpu_at_tiny_sizes(tmp_path):
    command = [sys.executable, "-m", "fastloss", "bench", "--device", "cpu", "--smoke", "--output", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["card"] == {"name": "cpu"}
    assert [row["case"] for row in report["rows"] if row["provider"] == "fastloss"] == [
        item.case.name for item in gpu.CASES
    ]
    for row in report["rows"]:
        assert row["status"] in ("ok", "not available"), row
        if row["status"] == "ok":
            assert row["mm_share"] == pytest.approx(row["tflops"] / report["peaks"]["used"][row["dtype"]])
            assert (row["copy_share"] is None) == (row["op"] != "z_loss" and not row["case"].startswith("gaunt"))
        assert f"| {row['case']} | {row['provider']} |" in (tmp_path / "gpu.md").read_text()
    assert {row["provider"] for row in report["rows"] if row["status"] == "ok"} >= {"fastloss", "eager"}
    assert report["step"]["status"] == "ok", report["step"]
    assert "| eager, log-softmax |" in (tmp_path / "gpu.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "--device cpu needs --smoke"),
        (["--device", "cuda"], "PyTorch sees no CUDA or ROCm device"),
    ],
)
def test_gpu_benchmark_says_why_it_does_not_run(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_roofline_is_what_the_script_writes_of_the_schedule():
    assert roofline.SHEET.read_text() == roofline.sheet()
    kernels = pytest.importorskip("fastloss.contrastive.triton", reason="the schedule is Triton's")
    for name in ("PANEL_ROWS", "PANEL_COLS", "ACCUMULATOR_BYTES"):
        assert getattr(roofline, name) == getattr(kernels, name)


def test_roofline_of_a_gaunt_product_is_that_of_its_launches():
    kernels = pytest.importorskip("fastloss.gaunt.triton", reason="the schedule is Triton's")
    product = Program((8,), ((Term(1, (0, 1)),),))
    gradients = product.gradient((True, True), (25, 25), (True,))
    lanes, points = kernels._TABLE["sm_90"].blocks
    table = antipodes(8, 16, kernels.TILE, points, torch.float32, torch.device("cpu"))
    phases = roofline.gaunt(4, lanes).phases
    for phase, program, degrees in zip(phases, (product, gradients), ((4, 4), (4, 4, 8)), strict=True):
        (launch,) = kernels._launches(degrees, program)
        tiles = sum(launch["EVEN"]) + sum(launch["ODD"]) + len(launch["SUMS"])
        assert phase.flops == 2 * lanes * len(table.weights) * kernels.TILE * tiles


def test_a_rival_that_fails_or_does_not_fit_is_named(monkeypatch):
    device = torch.device("cpu")
    item = gpu.CASES[0]
    case = gpu.moved(item.case.smoke(), device)

    def broken(*_):
        raise RuntimeError("out of luck\nand more")

    rivals = [
        Provider("broken", "", {"clip_loss": lambda: broken}),
        Provider("huge", "", PROVIDERS["eager"].losses, {"clip_loss": Formula("all", lambda sizes: 64 << 30)}),
    ]
    monkeypatch.setattr(gpu, "providers", lambda *_: rivals)

    def rows_until(deadline):
        return {row["provider"]: row for row in gpu._run_case(item, case, SUITE, device, 0, deadline, print)}

    rows = rows_until(math.inf)
    assert (rows["broken"]["status"], rows["broken"]["detail"]) == ("failed", "RuntimeError: out of luck")
    assert rows["huge"]["status"] == "not available"
    assert rows["huge"]["detail"].startswith("needs 64 GiB")
    assert {(row["status"], row["detail"]) for row in rows_until(0.0).values()} == {("not measured", "out of time")}


def test_what_the_gpu_benchmark_measured_is_kept_when_it_ends_early(tmp_path, monkeypatch):
    run_case, cases = gpu._run_case, []

    def second_fails(*arguments):
        cases.append(arguments)
        return run_case(*arguments) if len(cases) == 1 else sys.exit("the card hangs")

    monkeypatch.setattr(gpu, "_run_case", second_fails)
    with pytest.raises(SystemExit, match="hangs"):
        gpu.main("cpu", True, 0, tmp_path)
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert {row["case"] for row in report["rows"]} == {gpu.CASES[0].case.name}
    assert all(row["status"] != "ok" or row["tflops"] > 0 for row in report["rows"])
