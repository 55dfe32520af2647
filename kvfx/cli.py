"""The command line: `kvfx run | chat | explain | plan | recommend | calibrate | policies | opt |
eval | report | bench`.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from kvfx.errors import InputError, KvfxError

if TYPE_CHECKING:
    from rich.status import Status

    from kvfx.calibration import Calibration
    from kvfx.fit import MemoryPlan
    from kvfx.model import CompressedCache, CompressedModel
    from kvfx.recommendation import Recommendation
    from kvfx.report import Report

# stands for a reply where a chat template is rendered to see what follows one
REPLY = "kvfx-reply"
# tokens at which `run` and `chat` say what the cache would weigh
LONG = 4096
# what `bench decode` measures unless it is told otherwise
MODEL = "smollm2"
LENGTHS = "512,4096"
LONG_LENGTHS = "4096,32768,131072"
# columns that a table in a file may take
WIDE = 250


class Commands(TyperGroup):
    """Commands whose KvfxError ends the program with one line and exit code 1."""

    def invoke(self, ctx: typer.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except KvfxError as error:
            message = Text(f"error: {error}", style="red")
            Console(stderr=True).print(message, soft_wrap=True)
            raise typer.Exit(1) from error


class Printing(str, Enum):
    """What `kvfx opt` prints."""

    after_all = "after-all"
    after_change = "after-change"
    diff = "diff"
    statistics = "statistics"


class Asking(str, Enum):
    """When `kvfx eval` asks: after the context was compressed, or with it."""

    hidden = "hidden"
    visible = "visible"


class Filling(str, Enum):
    """How `kvfx bench decode --random-weights` makes its contexts."""

    prefill = "prefill"
    random = "random"


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="Compress the KV cache of a HuggingFace decoder by rewriting its graph.",
)
bench = typer.Typer(no_args_is_help=True, help="Measure, side by side and checked first.")
app.add_typer(bench, name="bench")

ModelArgument = Annotated[
    str, typer.Argument(help="A model folder, a .gguf file, or smollm2.", show_default=False)
]
PolicyOption = Annotated[
    str,
    typer.Option(
        "--policy",
        "-p",
        help="A preset (see: kvfx policies), or an expression: "
        "'StreamingLLM(budget=0.25) | KIVI(bits=4)'.",
    ),
]
# the policy where none is named, and no memory to choose one by
POLICY = "k8v4"
AnyPolicyOption = Annotated[
    str | None,
    typer.Option(
        "--policy",
        "-p",
        help="A preset (see: kvfx policies), or an expression: "
        "'StreamingLLM(budget=0.25) | KIVI(bits=4)'.",
        show_default="k8v4; with --memory, what kvfx recommend says",
    ),
]
MemoryOption = Annotated[
    str | None,
    typer.Option(
        help="Bytes that the cache may take at --context tokens: 64MiB.", show_default=False
    ),
]
ContextOption = Annotated[
    int | None,
    typer.Option(
        min=1, help="Tokens that --memory, or a budget in bytes, is for.", show_default=False
    ),
]
TokensOption = Annotated[int, typer.Option("--max-new-tokens", "-n", min=1)]
TemperatureOption = Annotated[float, typer.Option(min=0.0, help="0 is greedy.")]
CompileOption = Annotated[bool, typer.Option("--compile/--no-compile", help="Use torch.compile.")]
VerifyOption = Annotated[
    bool, typer.Option("--verify/--no-verify", help="Prove the rewrite on random tokens first.")
]
MaxLengthOption = Annotated[
    int | None, typer.Option(min=1, help="Most tokens of a conversation.", show_default=False)
]
CalibrationOption = Annotated[
    Path | None,
    typer.Option(help="What kvfx calibrate wrote, for policies that read it.", show_default=False),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def main() -> None:
    """Run the command line; the entry point of the `kvfx` program."""
    app(prog_name="kvfx")


@app.command()
def run(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(help="What to say to the model.", show_default=False)],
    policy: AnyPolicyOption = None,
    memory: MemoryOption = None,
    context: ContextOption = None,
    max_new_tokens: TokensOption = 128,
    temperature: TemperatureOption = 0.0,
    compile: CompileOption = True,
    verify: VerifyOption = True,
    max_length: MaxLengthOption = None,
    calibration: CalibrationOption = None,
    raw: Annotated[bool, typer.Option("--raw", help="Do not use the chat template.")] = False,
) -> None:
    """Generate from a compressed cache, then print what was done, how fast, and what it weighs."""
    source, tokenizer = _load(model)
    templated = tokenizer.chat_template is not None and not raw
    if templated:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
    fast = _compress(
        source,
        policy,
        compile=compile,
        verify=verify,
        max_length=max_length,
        memory=memory,
        context=context,
        calibration=_calibration(calibration),
    )
    ids = tokenizer(prompt, add_special_tokens=not templated, return_tensors="pt")["input_ids"]
    if ids.shape[1] == 0:
        raise InputError("the prompt has no tokens: say something")
    cache = fast.new_cache()
    _, clock = _stream(fast, tokenizer, ids, cache, max_new_tokens, temperature)
    console = _screen()
    console.print()
    _show(fast.report)
    console.print(_speed(clock))
    console.print(_weight(fast, cache))


@app.command()
def chat(
    model: ModelArgument,
    policy: AnyPolicyOption = None,
    memory: MemoryOption = None,
    context: ContextOption = None,
    max_new_tokens: TokensOption = 256,
    temperature: TemperatureOption = 0.0,
    compile: CompileOption = True,
    verify: VerifyOption = True,
    max_length: MaxLengthOption = None,
    calibration: CalibrationOption = None,
) -> None:
    """Talk on one cache, turn after turn; /exit or Ctrl-D ends it."""
    import torch

    source, tokenizer = _load(model)
    if tokenizer.chat_template is None:
        raise InputError(f"{model!r} has no chat template: use `kvfx run --raw`")
    fast = _compress(
        source,
        policy,
        compile=compile,
        verify=verify,
        max_length=max_length,
        memory=memory,
        context=context,
        calibration=_calibration(calibration),
    )
    console, cache = _screen(), fast.new_cache()
    console.print(f"[dim]{fast.report.headline()}\n/exit or Ctrl-D ends the chat[/]")
    said: torch.Tensor | None = None
    for line in _lines(console):
        text = _turn(tokenizer, line, said)
        new = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        ids = new if said is None else torch.cat((said, new.to(said.device)), 1)
        said, clock = _stream(fast, tokenizer, ids, cache, max_new_tokens, temperature)
        console.print(f"[dim]{_weight(fast, cache)}; {_speed(clock)}[/]")


@app.command()
def explain(
    model: ModelArgument,
    policy: AnyPolicyOption = None,
    memory: MemoryOption = None,
    context: ContextOption = None,
    calibration: CalibrationOption = None,
    as_json: JsonOption = False,
    html: Annotated[
        Path | None,
        typer.Option(
            help="Write a page to look at: graphs before and after, and every pass; if the model "
            "is refused, why.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Say what compress would do, site by site, without compiling or running anything."""
    import kvfx

    source = _load_model(model)
    with _status("capturing and rewriting"):
        report = kvfx.explain(
            source,
            _policy(policy, memory),
            memory=memory,
            context=context,
            calibration=_calibration(calibration),
            html=html,
        )
    if as_json:
        _print_json(report.to_dict())
    else:
        _show(report)


@app.command()
def plan(
    model: ModelArgument,
    memory: Annotated[
        str, typer.Option(help="Bytes of the cache: 8GiB, 512MiB, 1.5GB.", show_default=False)
    ],
    policy: PolicyOption = "k8v4",
    batch: Annotated[int | None, typer.Option(min=1, help="Rows.", show_default=False)] = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens of each prompt.", show_default=False)
    ] = None,
    new: Annotated[int, typer.Option(min=0, help="Tokens decoded after it.")] = 0,
    to: Annotated[
        Path | None, typer.Option(help="Write the plan to this file.", show_default=False)
    ] = None,
    calibration: CalibrationOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what fits: the largest context, the largest batch for a --context, or the largest budget
    for both.
    """
    import kvfx

    source = _load_model(model)
    with _status("capturing"):
        found = kvfx.plan(
            source,
            policy,
            memory=memory,
            batch=batch,
            context=context,
            new=new,
            calibration=_calibration(calibration),
        )
    if to is not None:
        kvfx.save_plan(found.plan, to)
    if as_json:
        _print_json(found.to_dict())
    else:
        _show(found)


@app.command()
def recommend(
    model: ModelArgument,
    memory: Annotated[
        str, typer.Option(help="Bytes of the cache: 8GiB, 512MiB, 1.5GB.", show_default=False)
    ],
    context: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.", show_default=False)],
    batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 1,
    candidates: Annotated[
        str | None,
        typer.Option(
            help="Policies, separated by commas outside of brackets.",
            show_default="fewer bits, fewer tokens, and both",
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=64, help="Tokens of each prompt that is read.")] = 1024,
    to: Annotated[
        Path | None, typer.Option(help="Write the best plan to this file.", show_default=False)
    ] = None,
    calibration: CalibrationOption = None,
    as_json: JsonOption = False,
) -> None:
    """Rank policies that fit by what they do to the model's predictions."""
    import kvfx

    source, tokenizer = _load(model)
    with _status("capturing") as status:
        found = kvfx.recommend(
            source,
            memory=memory,
            context=context,
            batch=batch,
            candidates=None if candidates is None else _split(candidates),
            calibration=_calibration(calibration),
            tokenizer=tokenizer,
            tokens=tokens,
            tell=status.update,
        )
    if to is not None:
        kvfx.save_plan(found.plan, to)
    if as_json:
        _print_json(found.to_dict())
    else:
        _show(found)


@app.command()
def calibrate(
    model: ModelArgument,
    out: Annotated[Path, typer.Option(help="Write the measurements to this file.")],
    text: Annotated[
        Path | None,
        typer.Option(help="A text file, one prompt per paragraph, instead of built-in prompts."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=64, help="Tokens of each prompt.")] = 512,
) -> None:
    """Measure what each layer can do without, for policies that are decided by it."""
    import kvfx

    source, tokenizer = _load(model)
    prompts = None if text is None else [part for part in text.read_text().split("\n\n") if part]
    with _status("capturing") as status:
        found = kvfx.calibrate(
            source,
            prompts,
            tokenizer=tokenizer,
            tokens=tokens,
            progress=lambda done, total: status.update(f"prompt {done} of {total}"),
        )
    found.save(out)
    typer.echo(f"{found.prompts} prompts of {found.tokens} tokens -> {out}")


@app.command()
def policies() -> None:
    """List the methods and the presets."""
    import inspect

    from rich import box
    from rich.table import Table

    from kvfx.policies import METHODS, PRESETS
    from kvfx.policy import Allocate, Divide, Merge, Refine, Select, Store
    from kvfx.report import short_policy

    parts = (Allocate, Select, Divide, Refine, Merge, Store)
    methods = Table("method", "role", "result", box=box.SIMPLE_HEAD, title="Methods")
    methods.add_column("paper", no_wrap=True)
    for method in METHODS:
        summary = (inspect.getdoc(method) or "").split("\n\n")[0].replace("\n", " ")
        # the paper has a column of its own
        summary = summary.split(" (http")[0].rstrip(".")
        roles = [base.role for base in parts if issubclass(method, base)]
        role = ", ".join(roles) or getattr(method, "role", "any")
        methods.add_row(
            method.__name__, role, summary, method.paper.removeprefix("https://") or "-"
        )
    presets = Table("preset", "policy", box=box.SIMPLE_HEAD, title="Presets")
    for name, preset in PRESETS.items():
        presets.add_row(name, short_policy(preset))
    console = _screen()
    console.print(methods)
    console.print(presets)


@app.command()
def opt(
    model: ModelArgument,
    passes: Annotated[
        str, typer.Option(help="Passes in order, separated by commas.")
    ] = "canonicalize,match-attention,match-masks,match-rope",
    printing: Annotated[Printing, typer.Option("--print", help="What to show.")] = Printing.diff,
) -> None:
    """Run raising passes on the captured graph and print what each did, as canonical text."""
    from kvfx.capture import capture
    from kvfx.pass_manager import Trail, run_passes
    from kvfx.passes.pipeline import raise_passes
    from kvfx.policies.parse import nearest

    known = {step.name: step for step in raise_passes()}
    chosen = [name.strip() for name in passes.split(",") if name.strip()]
    for name in chosen:
        if name not in known:
            raise InputError(f"there is no raising pass {name!r}: {nearest(name, known)}")
    source = _load_model(model)
    trail = Trail()
    with _status("capturing"):
        graph = capture(source)
    with _status("running passes"):
        run_passes(graph, [known[name] for name in chosen], trail)
    for step in trail.steps:
        changed = step.before != step.after
        if printing is Printing.diff:
            typer.echo(step.diff() or f"// {step.name} changes nothing")
        if printing is Printing.after_all or (printing is Printing.after_change and changed):
            typer.echo(f"// after {step.name}\n{step.after}")
    typer.echo(trail, err=printing is not Printing.statistics)


@app.command(name="eval")
def evaluate(
    model: ModelArgument,
    policies: Annotated[
        str, typer.Option(help="Policies, separated by commas outside of brackets.")
    ] = "k8v4,kivi-4bit,snapkv-25%",
    budgets: Annotated[
        str | None,
        typer.Option(
            help="Budgets for every policy that has one: 0.5 is a fraction, 512 a count.",
            show_default="those of the policies",
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            help="Equal bytes instead: 0.25 is a part of the dense cache, 24MiB a size; every "
            "policy gets the largest budget that fits.",
            show_default=False,
        ),
    ] = None,
    tasks: Annotated[
        str,
        typer.Option(help="perplexity, needle, ruler, or single tasks (docs/eval.md lists them)."),
    ] = "perplexity,needle",
    lengths: Annotated[str, typer.Option(help="Tokens of each context.")] = "1024",
    windows: Annotated[int, typer.Option(min=1, help="Windows of text for perplexity.")] = 8,
    scored: Annotated[int, typer.Option(min=1, help="Scored tokens per window.")] = 128,
    chunk: Annotated[
        int, typer.Option(min=1, help="Tokens read at once through the cache; 1 decodes.")
    ] = 32,
    samples: Annotated[int, typer.Option(min=1, help="Samples of every other task.")] = 20,
    question: Annotated[
        Asking, typer.Option(help="Whether compression sees the question.")
    ] = Asking.hidden,
    text: Annotated[str, typer.Option(help="python, shakespeare, or a text file.")] = "python",
    seed: Annotated[int, typer.Option(help="Chooses windows and draws samples.")] = 0,
    calibration: CalibrationOption = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Keep results here; what it holds is not repeated.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown tables.")] = False,
) -> None:
    """Measure quality through the cache, next to the dense model; gate what it cannot do itself."""
    from kvfx.eval.results import open_results
    from kvfx.eval.run import evaluate as run_suite
    from kvfx.eval.suite import Suite, task_names, with_budgets
    from kvfx.eval.text import corpus
    from kvfx.policies import policy_named

    if budgets is not None and memory is not None:
        raise InputError("--budgets and --memory exclude each other: give one of them")
    chosen = [policy_named(name) for name in _split(policies)]
    suite = Suite(
        policies=with_budgets(chosen, [] if budgets is None else _budgets(budgets)),
        tasks=task_names(_split(tasks)),
        lengths=tuple(_sizes(lengths)),
        text=corpus(text),
        seed=seed,
        windows=windows,
        scored=scored,
        chunk=chunk,
        samples=samples,
        question=question.value,
        memory=() if memory is None else tuple(map(_part, _split(memory))),
    )
    results = open_results(out)
    source, tokenizer = _load(model)
    measured = _calibration(calibration)
    with _status("preparing") as status:
        found = run_suite(model, source, tokenizer, suite, results, status.update, measured)
    for policy, reason in results.refused.items():
        typer.echo(f"not measured: {policy}: {reason}", err=True)
    if as_json:
        _print_json([measurement.to_dict() for measurement in found])
    else:
        _show_sections(found, markdown=markdown)


@app.command()
def report(
    results: Annotated[
        list[Path],
        typer.Argument(
            help="Results of eval --out, of bench decode --json, or plans of plan --to.",
            show_default=False,
        ),
    ],
    html: Annotated[Path, typer.Option(help="Write the page to this file.", show_default=False)],
    figures: Annotated[
        Path | None,
        typer.Option(
            help="Also write every picture to this folder: SVG, PNG, and its numbers as JSON.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Put results on one HTML page with pictures, which needs no network (pip install
    'kvfx[plot]').
    """
    from kvfx.figures.canvas import need_matplotlib
    from kvfx.figures.collect import pictures, save_all
    from kvfx.figures.inputs import read_inputs
    from kvfx.figures.page import save_report

    need_matplotlib(f"{html}: its pictures")
    inputs = read_inputs(results)
    with _status("drawing"):
        found = pictures(inputs)
        save_report(html, inputs, found)
        saved = [] if figures is None else save_all(found, figures)
    typer.echo(f"{len(found)} pictures -> {html}")
    if figures is not None:
        typer.echo(f"{len(saved)} files -> {figures}")


@bench.command()
def decode(
    model: Annotated[
        str | None,
        typer.Option(help="A model folder, a .gguf file, or smollm2.", show_default="smollm2"),
    ] = None,
    random_weights: Annotated[
        str | None,
        typer.Option(help="A published shape instead, as llama-3.1-8b.", show_default=False),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Context lengths in tokens.",
            show_default="512,4096; with --random-weights 4096,32768,131072",
        ),
    ] = None,
    policies: Annotated[
        str, typer.Option(help="Policies, separated by commas outside of brackets.")
    ] = "full,kivi-4bit,streaming-25%",
    new_tokens: Annotated[int, typer.Option(min=2, help="Timed tokens per round.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of every contender.")] = 3,
    compile: CompileOption = True,
    cold: Annotated[
        bool, typer.Option("--cold/--warm", help="Compile into an empty Inductor cache.")
    ] = True,
    fill: Annotated[
        Filling | None,
        typer.Option(
            help="How contexts come about, with --random-weights.", show_default="prefill"
        ),
    ] = None,
    max_batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Largest batch to try, with --random-weights.",
            show_default="256 on a GPU, 1 on a CPU",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Time decoding: HF's default, HF's static cache, and kvfx under each policy, in turns."""
    from kvfx.bench.decode import bench_decode
    from kvfx.bench.throughput import bench_random, default_max_batch
    from kvfx.policies import policy_named

    if model is not None and random_weights is not None:
        raise InputError("--model and --random-weights exclude each other: give one of them")
    if random_weights is None and (fill is not None or max_batch is not None):
        raise InputError("--fill and --max-batch go with --random-weights: add it, or drop them")
    names = _split(policies)
    for name in names:
        policy_named(name)
    sizes = _sizes(lengths or (LENGTHS if random_weights is None else LONG_LENGTHS))
    if random_weights is not None:
        with _status("preparing") as status:
            result = bench_random(
                random_weights,
                lengths=sizes,
                policies=names,
                fill=(fill or Filling.prefill).value,
                max_batch=max_batch or default_max_batch(),
                new_tokens=new_tokens,
                rounds=rounds,
                compile=compile,
                cold=cold,
                tell=status.update,
            )
    else:
        source, tokenizer = _load(model or MODEL)
        with _status("preparing") as status:
            result = bench_decode(
                model or MODEL,
                source,
                tokenizer,
                lengths=sizes,
                policies=names,
                new_tokens=new_tokens,
                rounds=rounds,
                compile=compile,
                cold=cold,
                tell=status.update,
            )
    if as_json:
        _print_json(result.to_dict())
    else:
        typer.echo(result)


@bench.command()
def kernels(
    ops: Annotated[
        str | None, typer.Option(help="Ops, separated by commas.", show_default="all")
    ] = None,
    shapes: Annotated[
        str | None,
        typer.Option(
            help="Shapes, separated by commas, as B8-H32-K8-D128-T32768 or with -ragged behind.",
            show_default="some of Llama-3.1-8B",
        ),
    ] = None,
    to_json: Annotated[
        Path | None,
        typer.Option("--json", help="Also write a JSON document here.", show_default=False),
    ] = None,
    check_only: Annotated[
        bool, typer.Option("--check-only", help="Do not time: needs no GPU.")
    ] = False,
) -> None:
    """Check every kernel against its definition, then time it on a GPU; exit 1 if one is wrong."""
    from kvfx.bench.cases import parse_shapes
    from kvfx.bench.kernels import bench_kernels

    sizes = None if shapes is None else parse_shapes(shapes)
    with _status("preparing") as status:
        result = bench_kernels(
            ops=None if ops is None else _split(ops),
            shapes=sizes,
            check_only=check_only,
            tell=status.update,
        )
    if to_json is not None:
        to_json.write_text(json.dumps(result.to_dict(), indent=2))
    console = _screen()
    if not console.is_terminal:
        # a file takes lines of any length
        console = Console(width=WIDE, highlight=False)
    console.print(result.headline(), markup=False, soft_wrap=True)
    console.print(result.render())
    console.print("\n".join(result.remarks()), markup=False, soft_wrap=True)
    if result.failed:
        raise typer.Exit(1)


@bench.command()
def reuse(
    model: Annotated[str, typer.Option(help="A model folder, a .gguf file, or smollm2.")] = MODEL,
    workloads: Annotated[
        str, typer.Option(help="rag, agents, turns, separated by commas.")
    ] = "rag,agents,turns",
    chunks: Annotated[int, typer.Option(help="rag: documents of a prompt.")] = 6,
    tokens: Annotated[int, typer.Option(help="rag: tokens of a document.")] = 512,
    prompts: Annotated[int, typer.Option(help="rag, turns: prompts that are measured.")] = 4,
    turn: Annotated[int, typer.Option(help="turns: tokens of a turn, 4 are kept.")] = 256,
    agents: Annotated[int, typer.Option(help="agents: how many, each reads those before.")] = 5,
    role: Annotated[int, typer.Option(help="agents: tokens of a role.")] = 128,
    question: Annotated[int, typer.Option(help="agents: tokens of a question.")] = 256,
    answer: Annotated[int, typer.Option(help="agents: tokens of an answer.")] = 64,
    rounds: Annotated[int, typer.Option(help="agents: questions that are asked.")] = 10,
    questions: Annotated[int, typer.Option(help="agents: different questions.")] = 3,
    scored: Annotated[int, typer.Option(help="Tokens of a reply that are compared.")] = 16,
    text: Annotated[str, typer.Option(help="python, shakespeare, or a text file.")] = "python",
    seed: Annotated[int, typer.Option(help="Chooses text, orders and questions.")] = 0,
    compile: CompileOption = True,
    as_json: JsonOption = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown tables.")] = False,
) -> None:
    """Time prompts that have pieces in common, and compare what follows with the dense model."""
    from kvfx.bench.reuse import bench_reuse
    from kvfx.bench.reuse_workloads import Sizes
    from kvfx.eval.text import corpus

    sizes = Sizes(
        chunks=chunks,
        tokens=tokens,
        prompts=prompts,
        turn=turn,
        agents=agents,
        role=role,
        question=question,
        answer=answer,
        rounds=rounds,
        questions=questions,
        scored=scored,
    )
    passages = corpus(text)
    source, tokenizer = _load(model)
    with _status("preparing") as status:
        result = bench_reuse(
            model,
            source,
            tokenizer,
            workloads=_split(workloads),
            sizes=sizes,
            text=passages,
            seed=seed,
            compile=compile,
            tell=status.update,
        )
    if as_json:
        _print_json(result.to_dict())
        return
    if markdown:
        typer.echo(result.markdown())
        return
    console = _screen()
    if not console.is_terminal:
        # a file takes lines of any length
        console = Console(width=WIDE, highlight=False)
    console.print(result.headline(), markup=False, soft_wrap=True)
    for part in result.sections():
        console.print(part.render())


def _load(model: str) -> tuple[Any, Any]:
    """The model and its tokenizer, with gradients off."""
    from kvfx import models

    source, tokenizer = models.load(model)
    return source.requires_grad_(False), tokenizer


def _load_model(model: str) -> Any:
    """The model alone, with gradients off."""
    from kvfx import models

    return models.load_model(model).requires_grad_(False)


def _calibration(path: Path | None) -> Calibration | None:
    if path is None:
        return None
    from kvfx.calibration import Calibration

    return Calibration.load(path)


def _compress(
    source: Any, policy: str | None, *, verify: bool, memory: str | None, **options: Any
) -> CompressedModel:
    import kvfx

    with _status(f"capturing, rewriting{' and verifying' if verify else ''}"):
        return kvfx.compress(
            source, _policy(policy, memory), verify=verify, memory=memory, **options
        )


def _policy(policy: str | None, memory: str | None) -> str | None:
    """The policy that was named; without one, a memory chooses."""
    return POLICY if policy is None and memory is None else policy


def _stream(
    fast: CompressedModel,
    tokenizer: Any,
    ids: Any,
    cache: CompressedCache,
    max_new_tokens: int,
    temperature: float,
) -> tuple[Any, Any]:
    """Write tokens to stdout as they come: the whole sequence [1, S], and when tokens came."""
    from transformers import TextStreamer

    from kvfx.bench.clock import GREEDY, generate_clocked

    text = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else GREEDY
    options = {**sampling, "past_key_values": cache}
    with _status("reading the prompt (the first run compiles)") as status:
        ids = ids.to(fast.device)
        ids, clock = generate_clocked(fast, ids, max_new_tokens, options, _then(status, text.put))
        text.end()
    return ids, clock


def _then(status: Status, put: Callable[[Any], None]) -> Callable[[Any], None]:
    """Clear the status line when the first token is there, then write tokens."""
    seen = 0

    def show(value: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == 2:
            status.stop()
        put(value)

    return show


def _lines(console: Console) -> Iterator[str]:
    """What the user types, until /exit or the end of input."""
    while True:
        try:
            line = console.input("[bold]> [/]").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if line == "/exit":
            return
        if line:
            yield line


def _turn(tokenizer: Any, line: str, said: Any) -> str:
    """The user's turn as the chat template writes it, after what closes the last reply."""
    user = {"role": "user", "content": line}
    if said is None:
        messages = [user]
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    messages = [{"role": "user", "content": "-"}, {"role": "assistant", "content": REPLY}, user]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    closing, last = text.partition(REPLY)[2], tokenizer.decode(said[0, -1])
    # the model closed its reply itself, unless it ran out of tokens
    if last in tokenizer.all_special_tokens and closing.lstrip().startswith(last):
        return closing.lstrip().removeprefix(last)
    return closing


def _speed(clock: Any) -> str:
    """Tokens and their pace, the compilation of the first ones left out by the median."""
    count = len(clock.times) - 1
    text = f"{count} tokens; first after {clock.first:.1f} s"
    if not clock.steps:
        return text
    step = statistics.median(clock.steps)
    return f"{text}, then {1e3 * step:.0f} ms each ({1 / step:.1f} tokens/s, median)"


def _weight(fast: CompressedModel, cache: CompressedCache) -> str:
    """Measured bytes of the cache, beside those of a dense one; and of both at a long context."""
    from kvfx.bench.machine import bytes_text

    tokens, dense = cache.get_seq_length(), fast.report.before
    now = f"{bytes_text(cache.nbytes())} allocated for {tokens:,} tokens"
    now = f"{now} (dense {bytes_text(dense * tokens)})"
    long = f"at {LONG:,} tokens {bytes_text(fast.memory(1, LONG))}"
    return f"cache {now}; {long} (dense {bytes_text(dense * LONG)})"


def _split(text: str) -> list[str]:
    """The parts between commas that stand outside of all brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def _sizes(text: str) -> Sequence[int]:
    sizes = [part.strip() for part in text.split(",")]
    if not all(size.isdecimal() and int(size) > 1 for size in sizes):
        raise InputError(f"--lengths {text!r}: expected integers above 1, separated by commas")
    return [int(size) for size in sizes]


def _budgets(text: str) -> list[float | int]:
    """Fractions and counts, as they are typed."""
    try:
        return [int(part) if part.strip().isdecimal() else float(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(
            f"--budgets {text!r}: expected numbers, separated by commas: 0.5 is a fraction, 512 "
            "a count of entries"
        ) from error


def _part(text: str) -> float | str:
    """A part of the dense cache, or a size."""
    try:
        return text if text.isdecimal() else float(text)
    except ValueError:
        return text


def _show_sections(found: Any, *, markdown: bool) -> None:
    """Tables of measurements: Markdown, or drawn."""
    from kvfx.eval.table import headline, sections

    if markdown:
        typer.echo("\n".join((headline(found), "", *(part.markdown() for part in sections(found)))))
        return
    console = _screen()
    if not console.is_terminal:
        # a file takes lines of any length
        console = Console(width=WIDE, highlight=False)
    console.print(headline(found), markup=False, soft_wrap=True)
    for part in sections(found):
        console.print(part.render())


def _show(report: Report | MemoryPlan | Recommendation) -> None:
    """The report: drawn on a terminal, plain where the output is a file."""
    console = _screen()
    if console.is_terminal:
        console.print(report.render())
    else:
        typer.echo(report)


def _print_json(document: object) -> None:
    typer.echo(json.dumps(document, indent=2))


def _screen() -> Console:
    """Where results go; lines are not wrapped where the output is a file."""
    return Console(soft_wrap=True, highlight=False)


@contextmanager
def _status(what: str) -> Iterator[Status]:
    """Show on a terminal what takes time; silent anywhere else."""
    with Console(file=sys.stderr).status(what) as status:
        yield status
