"""halo convert, reshard, export, verify, inspect: models between folders, a block of rows at a time."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from halo_jobs.commands.consoles import console, errors
from terminal_output import ProgressBar

if TYPE_CHECKING:
    from hypenet_tools.folder_job import FolderJob, JobPart

GIGABYTE = 10**9
_SIZES = "Size in the target layout; must divide"

TensorOption = Annotated[int, typer.Option("--tp", min=1, help=f"{_SIZES} heads, channels and vocabulary.")]
PipelineOption = Annotated[int, typer.Option("--pp", min=1, help=f"{_SIZES} the layers.")]
ExpertOption = Annotated[int, typer.Option("--ep", min=1, help=f"{_SIZES} the experts.")]
WorkersOption = Annotated[
    int | None, typer.Option("--workers", min=1, help="Files written at a time on this machine. Default: one per core.")
]
PartOption = Annotated[
    str,
    typer.Option(
        "--part",
        help="Do part I of N, from 0/N on. Run the same command on every node, each with another part, such as "
        "--part $SLURM_PROCID/$SLURM_NTASKS under srun. The one that finishes last publishes the folder.",
    ),
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Check everything and print what would be written; write nothing.")
]
ShardOption = Annotated[
    float,
    typer.Option("--shard-gb", min=0.000001, help="Largest file, in 10^9 bytes (one tensor may exceed it)."),
]
SeedOption = Annotated[
    int, typer.Option("--seed", help="Seed of new gates, recorded in the folder's provenance.")
]
DtypeOption = Annotated[
    str | None, typer.Option("--dtype", help="bf16, fp16 or fp32. Default: every tensor keeps its dtype.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object, for scripts.")]


def convert(
    source: Annotated[Path, typer.Argument(help="A model folder as downloaded from Hugging Face.")],
    out: Annotated[Path, typer.Argument(help="The weights folder to write; must not exist yet.")],
    tensor: TensorOption = 1,
    pipeline: PipelineOption = 1,
    expert: ExpertOption = 1,
    hybrid: Annotated[
        str | None,
        typer.Option(
            "--hybrid",
            help="Also initialise the hybrid (stage 0): hypenet-2b, hypenet-5b, hypenet-9b, or attention layers such "
            "as 2,3,6. Clones key/value heads for the recurrent layers and draws the output gates.",
        ),
    ] = None,
    from_hypenet: Annotated[
        bool,
        typer.Option(
            "--from-hypenet",
            help="SOURCE is a HypeNet: a release, or a checkpoint of the reference implementation (model.safetensors "
            "beside a config.json with mixer_types; names may contain teacher_layer. and student_layer.).",
        ),
    ] = False,
    seed: SeedOption = 0,
    shard_gb: ShardOption = 1.0,
    workers: WorkersOption = None,
    part: PartOption = "0/1",
    dry_run: DryRunOption = False,
) -> None:
    """Convert a Qwen3 or HypeNet folder to a weights folder for training, at any parallel layout.

    Reads every dense Qwen3 (0.6B to 32B) and the mixtures 30B-A3B and 235B-A22B, base and instruct, in bf16, fp16 or
    fp32. Quantised weights (GPTQ, AWQ, fp8) are refused. Tensors are copied from memory-mapped files a block at a
    time, so memory stays near half a gigabyte whatever the model's size.

    OUT appears when it is complete. Until then the work is in OUT.unfinished. The same command resumes it and keeps
    finished files whose checksums match.

    Example: halo convert Qwen3-8B hybrid-8b --hybrid hypenet-9b --tp 4 --pp 2
    """
    from hypenet_tools.convert import convert_job, import_job
    from hypenet_tools.layout import FolderLayout

    layout, size = FolderLayout(tensor, pipeline, expert), round(shard_gb * GIGABYTE)
    if from_hypenet:
        if hybrid is not None:
            raise ValueError(
                "--hybrid makes a hybrid from a teacher, --from-hypenet reads one; give one of them"
            )
        job = import_job(source, out, layout, seed=seed, max_shard_bytes=size)
    else:
        job = convert_job(source, out, layout, hybrid=hybrid, seed=seed, max_shard_bytes=size)
    _run(job, workers, part, dry_run)


def reshard(
    source: Annotated[Path, typer.Argument(help="A weights folder, or a training checkpoint (step-...).")],
    out: Annotated[Path, typer.Argument(help="The folder to write; must not exist yet.")],
    tensor: TensorOption = 1,
    pipeline: PipelineOption = 1,
    expert: ExpertOption = 1,
    weights_only: Annotated[
        bool,
        typer.Option(
            "--weights-only",
            help="Leave the optimizer of a training checkpoint out and write a weights folder.",
        ),
    ] = False,
    dtype: DtypeOption = None,
    shard_gb: ShardOption = 1.0,
    workers: WorkersOption = None,
    part: PartOption = "0/1",
    dry_run: DryRunOption = False,
) -> None:
    """Write weights, or a training checkpoint, for another layout, without building the model and without GPUs.

    Any folder loads at any layout. In one that was written for the layout that loads it, every rank reads its own files
    from beginning to end. Weights may change their dtype; a training checkpoint keeps every bit. Resumes like
    `halo convert`.

    Example: halo reshard hybrid-8b hybrid-8b-tp8 --tp 8
    """
    from hypenet_tools.convert import reshard_job
    from hypenet_tools.layout import FolderLayout
    from hypenet_tools.open_model import TRAINING, open_model

    opened, target = open_model(source), _dtype(dtype)
    if opened.kind == TRAINING and not weights_only:
        if target is not None:
            raise ValueError(f"--dtype is for weights, and {source} has an optimizer too; add --weights-only")
        opened = opened.with_optimizer()
    layout, size = FolderLayout(tensor, pipeline, expert), round(shard_gb * GIGABYTE)
    _run(reshard_job(opened, out, layout, dtype=target, max_shard_bytes=size), workers, part, dry_run)


def export(
    source: Annotated[
        Path,
        typer.Argument(
            help="The folder of a finished run, a weights folder, a training checkpoint, or a Hugging Face folder."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The Hugging Face folder to write; must not exist yet.")],
    shard_gb: ShardOption = 5.0,
    dtype: DtypeOption = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option("--tokenizer", help="Folder with tokenizer.json, if SOURCE has none."),
    ] = None,
    logits_scaling: Annotated[
        float | None,
        typer.Option("--logits-scaling", help="The a of log(t + a) / log(a); replaces that of the hybrid."),
    ] = None,
    workers: WorkersOption = None,
    part: PartOption = "0/1",
    dry_run: DryRunOption = False,
) -> None:
    """Write a folder that is ready to upload and loads in transformers.

    It holds safetensors (with an index if there are several), config, generation config, tokenizer, chat template,
    licence, a model card, a hybrid's modelling code, and SHA256SUMS. The card of a finished run has data, tokens,
    selection and scores. Resumes like `halo convert`.

    Example: halo export runs/my-run my-hypenet --shard-gb 5
    """
    from halo_jobs.release_sources import release_source
    from hypenet_tools.export import export_job

    opened = release_source(source)
    job = export_job(
        opened,
        out,
        tokenizer_folder=tokenizer,
        logits_scaling_base=logits_scaling,
        dtype=_dtype(dtype),
        max_shard_bytes=round(shard_gb * GIGABYTE),
    )
    _run(job, workers, part, dry_run)


def verify(
    a: Annotated[Path, typer.Argument(help="A Hugging Face folder, weights folder or training checkpoint.")],
    b: Annotated[Path, typer.Argument(help="Another one; it may be of another kind.")],
    as_json: JsonOption = False,
) -> None:
    """Compare two models: every tensor bit for bit through the mapping, checksums, and logits on fixed prompts.

    Exit code 0: the same model. Exit code 1: not the same; the report says what differs. Logits (largest difference,
    cosine, agreement of the most likely token) are computed in fp32 if the models fit into memory.

    Keys of --json: match (true or false), a, b, model, tensors, logits, files_not_matching_their_checksum.
    """
    from hypenet_tools.open_model import open_model
    from hypenet_tools.verify import verify as compare

    one, other = open_model(a), open_model(b)
    with ProgressBar("comparing", one.stored.nbytes, errors, in_bytes=True) as bar:
        result = compare(one, other, advance=bar.advance)
    _report(result, as_json)
    if not result["match"]:
        raise RuntimeError(f"{a} and {b} are not the same model; the report above says what differs")


def inspect(
    folder: Annotated[
        Path, typer.Argument(help="A Hugging Face folder, weights folder or training checkpoint.")
    ],
    as_json: JsonOption = False,
) -> None:
    """Print what a model folder contains: model, layout, sizes, dtypes, provenance, NaN and infinite values.

    Reads everything and checks it against the folder's checksums.

    Keys of --json: folder, kind, model, complete, layout, tensors, parameters, bytes, files, dtypes, nan, inf,
    tensors_not_finite, files_not_matching_their_checksum, provenance.
    """
    from hypenet_tools.inspection import inspect_model
    from hypenet_tools.open_model import open_model

    opened = open_model(folder)
    with ProgressBar("reading", opened.stored.nbytes, errors, in_bytes=True) as bar:
        result = inspect_model(opened, advance=bar.advance)
    _report(result, as_json)


def _dtype(name: str | None) -> Any:
    if name is None:
        return None
    import torch

    known = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if name not in known:
        raise ValueError(f"--dtype {name} is not one of {', '.join(known)}")
    return known[name]


def _parse_part(text: str) -> JobPart:
    from hypenet_tools.folder_job import JobPart

    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ValueError(f"--part {text} is not I/N with I from 0 to N - 1, such as 0/4")
    return JobPart(int(index), int(count))


def _run(job: FolderJob, workers: int | None, part_text: str, dry_run: bool) -> None:
    from hypenet_tools.folder_job import run_job

    part = _parse_part(part_text)
    nbytes = sum(file.nbytes for file in job.tensor_files[part.index :: part.count])
    if dry_run:
        job.require_free(part)
        free = shutil.disk_usage(next(p for p in job.out.absolute().parents if p.exists())).free
        tensors = sum(len(file.tensors) for file in job.tensor_files)
        _print(
            f"{job.out}: {len(job.tensor_files)} files with {tensors:,} tensors or rectangles of them, "
            f"{job.nbytes / GIGABYTE:.2f} GB; {free / GIGABYTE:.2f} GB are free. Nothing was written."
        )
        return
    with ProgressBar(job.out.name, nbytes, errors, in_bytes=True) as bar:
        threads = workers or len(os.sched_getaffinity(0))
        complete = run_job(job, workers=threads, part=part, advance=bar.advance)
    if complete:
        _print(f"{job.out}: complete")
    else:
        _print(f"Part {part_text} is done; {job.out} appears when the other parts are")


def _print(sentence: str) -> None:
    console.print(sentence, soft_wrap=True, highlight=False)


def _report(report: dict[str, Any], as_json: bool) -> None:
    """Print a report as JSON for scripts, or as YAML for people."""
    text = json.dumps(report, indent=2)
    print(text if as_json else yaml.safe_dump(json.loads(text), sort_keys=False).rstrip())
