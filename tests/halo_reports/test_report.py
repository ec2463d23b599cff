"""The report and the model cards of a synthetic run folder."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from jinja2 import UndefinedError

from halo_evaluation.results import Selection
from halo_evaluation.selection.scores import LayerScore, LayerSweep, all_choices, layer_importance
from halo_reports.build import build_report
from halo_reports.formatting import count
from halo_reports.model_card import DataSource, model_card
from halo_reports.run_facts import load_run
from terminal_output import duration

NUM_LAYERS = 10
HOSTILE = "<script>alert('&')</script>"
RECIPE = f"# comment with {HOSTILE} and $dollars$\nname: synthetic\nalign:\n  steps: 400\n"
# model -> needle score within the training context, factor per doubling beyond it, proxy score, perplexity
MODELS = {
    "teacher": (1.0, 0.30, 0.62, 17.31),
    "hybrid": (0.97, 0.93, 0.60, 18.04),
    "uniform": (0.81, 0.85, 0.58, 18.40),
    "last_half": (0.52, 0.80, 0.55, 18.95),
    "all_rnn": (0.06, 0.60, 0.50, 20.77),
}
TRAINING_CONTEXT = 1024


def write_json_file(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def done(stage: str, seconds: float, outputs: list[str], summary: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "stage": stage,
        "input_hash": "0123456789ab",
        "attempt": "2" if stage == "align" else "1",
        "started": "2026-02-03T10:00:00+00:00",
        "finished": "2026-02-03T10:11:00+00:00",
        "seconds": seconds,
        "outputs": dict.fromkeys(outputs, "0" * 64),
        "summary": summary,
    }


def metrics_lines(steps: int, start: float, end: float, noise: random.Random) -> list[str]:
    lines = []
    for step in range(1, steps + 1):
        loss = end + (start - end) * math.exp(-6 * step / steps) * noise.uniform(0.9, 1.1)
        tokens = step * 4096
        speed = noise.uniform(9_000, 11_000)
        entry = {
            "step": step,
            "loss": loss,
            "learning_rate": 1e-3,
            "gradient_norm": 0.5,
            "tokens_per_second": speed,
        }
        entry |= {"elapsed_seconds": tokens / 10_000, "consumed_samples": step * 8, "consumed_tokens": tokens}
        lines.append(json.dumps(entry))
    return lines


def selection_file() -> dict[str, Any]:
    noise = random.Random(5)
    layers = tuple(
        LayerScore(layer, noise.uniform(0.3, 0.95), noise.uniform(0.3, 0.6), noise.uniform(0.01, 0.4))
        for layer in range(NUM_LAYERS)
    )
    sweep = LayerSweep(layers, 0.96, 0.61)
    importance = layer_importance("halo", sweep)
    assert importance is not None
    choices = all_choices(sweep)
    selection = Selection("halo", choices["halo"], sweep, importance, choices)
    return asdict(selection)


def evaluation_file(model: str) -> dict[str, Any]:
    within, decay, proxy, perplexity = MODELS[model]
    cells = []
    for task in ("niah_single_1", "niah_single_2", "niah_single_3"):
        for context in (256, 512, 1024, 2048, 4096, 8192):
            beyond = max(0.0, math.log2(context / TRAINING_CONTEXT))
            for depth in (0.0, 0.25, 0.5, 0.75, 1.0):
                score = round(8 * within * decay**beyond * (1 - 0.1 * beyond * (1 - depth))) / 8
                cell = {"task": task, "context_length": context, "depth": depth, "score": score, "items": 8}
                cells.append(cell)
    tasks = {
        "key_value_recall": {"score": within * 0.9, "group": "recall"},
        f"last_word_{HOSTILE}": {"score": proxy},
        "next_sentence": {"score": proxy + 0.02, "group": "commonsense"},
    }
    return {
        "model": model,
        "training_context": TRAINING_CONTEXT,
        "tasks": tasks,
        "niah": cells,
        "perplexity": perplexity,
    }


def write_synthetic_run(run_folder: Path) -> dict[str, Path]:
    """A finished run with three baselines; returns its stage folders."""
    noise = random.Random(3)
    folders: dict[str, Path] = {}

    def add(
        stage: str, seconds: float, files: Mapping[str, Any], summary: Mapping[str, Any] | None = None
    ) -> None:
        folder = folders[stage] = run_folder / stage / "0123456789ab"
        for name, content in files.items():
            if name == "metrics.jsonl":
                folder.mkdir(parents=True, exist_ok=True)
                (folder / name).write_text("\n".join(content) + "\n")
            else:
                write_json_file(folder / name, content)
        write_json_file(folder / "DONE.json", done(stage, seconds, list(files), summary or {}))

    run_folder.mkdir(parents=True, exist_ok=True)
    (run_folder / "recipe.yaml").write_text(RECIPE)
    add("tokenize", 4.2, {}, {"tokens": 3_700_000})
    add("init", 0.6, {})
    align = metrics_lines(400, 0.9, 0.012, noise)
    align[200:200] = align[150:200]  # a killed attempt's steps, trained again
    add("align", 131.0, {"metrics.jsonl": align}, {"note": HOSTILE})
    add("select", 37.5, {"selection.json": selection_file()})
    for variant in ("hybrid", "uniform", "last_half", "all_rnn"):
        worse = 20 * (MODELS[variant][3] / 18 - 1)
        distill = metrics_lines(300, 4.0, 0.05 * (1 + worse), noise)
        finetune = metrics_lines(120, 3.4, math.log(MODELS[variant][3]), noise)
        add(f"distill.{variant}", 152.0, {"metrics.jsonl": distill})
        add(f"finetune.{variant}", 64.0, {"metrics.jsonl": finetune})
        candidates = [
            {"base": base, "loss": 3 + 0.02 * math.log(base / 600) ** 2} for base in (100, 300, 600, 900)
        ]
        calibration = {"base": 600, "candidates": [*candidates, {"base": None, "loss": 3.06}]}
        if variant == "hybrid":
            add("calibrate.hybrid", 9.1, {"calibration.json": calibration})
    for model in MODELS:
        add(f"evaluate.{model}", 21.0, {"evaluation.json": evaluation_file(model)})
    add("export", 1.4, {"model/config.json": {}})
    return folders


@pytest.fixture(scope="module")
def stage_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_synthetic_run(tmp_path_factory.mktemp("runs") / "synthetic")


@pytest.fixture(scope="module")
def page(stage_folders: dict[str, Path]) -> str:
    run_folder = stage_folders["init"].parents[1]
    return build_report(run_folder, stage_folders, run_folder / "report" / "report.html").read_text()


class Outline(HTMLParser):
    """Collects the text, the tags and the attributes of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text: list[str] = []
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.ids: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attributes
        self.ids += [value for name, value in attributes if name == "id" and value]
        if tag not in ("meta", "link", "br", "img", "hr", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def visible_text(page: str) -> str:
    return " ".join(" ".join(Outline(page).text).split())


def test_page_is_well_formed_and_needs_nothing_from_outside(page: str) -> None:
    outline = Outline(page)
    assert outline.open == []
    assert not {"script", "link", "img", "iframe"} & set(outline.tags)
    references = [value or "" for name, value in outline.attributes if name in ("href", "xlink:href", "src")]
    assert all(reference.startswith("#") for reference in references)
    assert "http" not in page
    assert "@import" not in page
    assert len(outline.ids) == len(set(outline.ids))
    assert page.count("<svg") == page.count('role="img" aria-label="') == 5 * (1 + 3) + 1 + 1 + 3 + 1


def test_page_states_the_outcome(page: str) -> None:
    text = visible_text(page)
    assert (
        "With softmax attention in 2 of 10 layers (20%), the hybrid finds 100.0% of needles against the "
        "teacher's 100.0% within 1,024 tokens and has a held-out perplexity of 18.04 against 17.31."
    ) in text
    assert "at the same context lengths: Uniform 75.0%, Last half 50.0%, All RNN 0.0%." in text
    assert "local proxies" in text
    assert "AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)" in text
    assert "export/0123456789ab/model" in text
    for heading in ("Needle in a haystack", "Local proxies", "Layers that keep attention", "Loss curves"):
        assert heading in text


def test_page_has_the_cost_of_every_stage(page: str) -> None:
    text = visible_text(page)
    total = 4.2 + 0.6 + 131.0 + 37.5 + 4 * (152.0 + 64.0) + 9.1 + 5 * 21.0 + 1.4
    assert f"Total: {total // 60:.0f} min {total % 60:02.0f} s." in text
    assert "align 2 min 11 s 400 1.64M" in text
    assert "Baselines, for comparison only" in text


def test_strings_from_files_are_escaped(page: str) -> None:
    assert HOSTILE not in page
    text = "".join(Outline(page).text)
    assert f"last_word_{HOSTILE}" in text
    assert RECIPE in text


def test_repeated_steps_count_once_and_a_torn_last_line_not_at_all(tmp_path: Path) -> None:
    folders = write_synthetic_run(tmp_path / "run")
    metrics = folders["align"] / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 401, "lo')
    curve = load_run(tmp_path / "run", folders).curves["align"]
    assert curve.steps == tuple(range(1, 401))
    metrics.write_text('{"step"\n' + metrics.read_text())
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 1 is not a metrics line"):
        load_run(tmp_path / "run", folders)


@pytest.mark.parametrize(
    "stages", [(), ("align",), ("align", "select"), ("evaluate.teacher",), ("evaluate.hybrid",)]
)
def test_unfinished_runs_have_a_report_too(
    stages: tuple[str, ...], stage_folders: dict[str, Path], tmp_path: Path
) -> None:
    some = {stage: stage_folders[stage] for stage in stages}
    page = build_report(
        tmp_path, some | {"export": tmp_path / "missing"}, tmp_path / "report.html"
    ).read_text()
    assert Outline(page).open == []
    assert ("has been evaluated yet" in page) == (not any(stage.startswith("evaluate") for stage in stages))
    assert ("The teacher finds 100.0% of needles within 1,024 tokens" in page) == (
        "evaluate.teacher" in stages
    )
    assert ("Layers that keep attention" in page) == ("select" in stages)
    assert "Use the exported model" not in page


def test_broken_files_are_named(tmp_path: Path) -> None:
    folders = write_synthetic_run(tmp_path / "run")
    path = folders["select"] / "selection.json"
    content = json.loads(path.read_text())
    del content["choices"]
    write_json_file(path, content)
    with pytest.raises(
        ValueError, match=r"selection\.json is malformed \(choices: Field required\)"
    ):
        load_run(tmp_path / "run", folders)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"selection\.json is not valid JSON"):
        load_run(tmp_path / "run", folders)


def test_contexts_are_compared_where_all_models_were_trained(tmp_path: Path) -> None:
    folders = write_synthetic_run(tmp_path / "run")
    path = folders["evaluate.hybrid"] / "evaluation.json"
    write_json_file(path, json.loads(path.read_text()) | {"training_context": 4096})
    run = load_run(tmp_path / "run", folders)
    assert run.fair_context == TRAINING_CONTEXT
    assert list(run.evaluations) == list(MODELS)
    assert run.evaluations["uniform"].needle_recall(0, TRAINING_CONTEXT) == 0.75
    assert run.evaluations["uniform"].needle_recall(1, 2) is None


CONFIG = {"num_hidden_layers": 10, "hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4}
CONFIG |= {"num_key_value_heads": 2, "head_dim": 64, "vocab_size": 8192}
DATA = [
    DataSource("Union | addresses", "public domain", 3_700_000, "held-out documents apart"),
    DataSource("Needles", "-"),
]


def test_hybrid_card_says_what_the_run_says(stage_folders: dict[str, Path]) -> None:
    run = load_run(stage_folders["init"].parents[1], stage_folders)
    card = model_card(
        run, title="Tiny hybrid", base_model="tiny-teacher", config=CONFIG, student="Lightning Attention",
        parameters=9_400_000, licence="apache-2.0", data=DATA, command="halo demo",
    )  # fmt: skip
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert 'license: "apache-2.0"\nbase_model: "tiny-teacher"\n' in card
    assert "Layers 3, 6 of 10 (counted from 0) keep softmax attention, selected by the HALO ranking." in card
    assert "9.4M parameters: 10 layers, hidden size 256" in card
    assert "| Task | Teacher | Hybrid | Uniform | Last half | All RNN |" in card
    assert "| Held-out perplexity (lower is better) | 17.31 | 18.04 | 18.40 | 18.95 | 20.77 |" in card
    assert "| Union \\| addresses | public domain | 3.7M | held-out documents apart |" in card
    assert "| align | 2 min 11 s | 400 steps, 1.64M tokens, final loss" in card
    assert "distill.uniform" not in card
    assert "Calibration on long documents chose a = 600." in card
    assert "local proxies" in card
    assert "The modelling code in this folder is part of\nhypenet-megatron and has the Apache License 2.0." in card


def test_teacher_card_of_a_pretraining_run(tmp_path: Path) -> None:
    folder = tmp_path / "pretrain" / "0123456789ab"
    write_json_file(folder / "DONE.json", done("pretrain", 420.0, ["model.safetensors"], {}))
    (folder / "metrics.jsonl").write_text("\n".join(metrics_lines(80, 9.0, 2.8, random.Random(1))))
    evaluate = tmp_path / "evaluate.teacher" / "0123456789ab"
    write_json_file(evaluate / "evaluation.json", evaluation_file("teacher"))
    run = load_run(tmp_path, {"pretrain": folder, "evaluate.teacher": evaluate})
    arguments: dict[str, Any] = {
        "title": "Tiny teacher",
        "parameters": 9_000_000,
        "licence": "mit",
        "data": DATA,
        "command": "halo pretrain",
    }
    card = model_card(run, config=CONFIG, ngram_perplexity=88.125, **arguments)
    assert (
        "The teacher finds 100.0% of needles within 1,024 tokens and has a held-out perplexity of 17.31."
        in card
    )
    assert "the perplexity of an n-gram model is 88.12, that of this model 17.31." in card
    assert "| pretrain | 7 min 00 s | 80 steps, 328K tokens, final loss" in card
    rows = [line for line in card.splitlines() if line.startswith(("| 10 |", "| 80 |"))]
    assert len(rows) == 2
    assert float(rows[0].split("|")[2]) > float(rows[1].split("|")[2])
    with pytest.raises(UndefinedError, match="'head_dim'"):
        model_card(run, config={k: v for k, v in CONFIG.items() if k != "head_dim"}, **arguments)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.44, "0.4 s"), (47.6, "48 s"), (59.7, "1 min 00 s"), (185, "3 min 05 s"), (7620, "2 h 07 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "kilo", "text"),
    [
        (512, 1024, "512"),
        (8192, 1024, "8K"),
        (1_638_400, 1000, "1.64M"),
        (492_000, 1000, "492K"),
        (2e9, 1000, "2B"),
    ],
)
def test_counts(number: float, kilo: int, text: str) -> None:
    assert count(number, kilo) == text
