r"""How fast the audit shows the next prompt: from a key to the candidates' pictures, in headless Chromium.

Example (Chromium and chromedriver; some minutes and a few GB of disk):
    python -m benchmarks.audit_pages --output benchmarks/audit_pages.md

The tables are synthetic, written as the stages write them: each prompt has 8 candidates with latents and rewards,
and a pair. Small pictures in great number; then pictures of 512 pixels until they fill 2 GB.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import tyro

from stages.core.artifacts.files import write_text
from stages.core.artifacts.images import encode_png
from stages.core.artifacts.schemas import CANDIDATES, REWARDS, TRAINING_PAIRS
from stages.core.artifacts.tables import writing_table
from tests.browsers import browser

CANDIDATES_EACH, DRAWS = 8, 10
DIFFERENT = 64
"""Different pictures; their bytes repeat, and the page asks for each by its row."""
PRESS = """
const done = arguments[0], place = () => document.querySelector('.where strong').textContent;
const before = place(), began = performance.now();
document.body.dispatchEvent(new KeyboardEvent('keydown', {key: 'j', bubbles: true}));
const look = () => {
    const shown = [...document.images];
    if (place() !== before && shown.length && shown.every(i => i.complete && i.naturalWidth > 0))
        done(performance.now() - began);
    else setTimeout(look, 2);
};
look();
"""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Time from a key to the next prompt's pictures."""

    prompts: int = 20_000
    """Prompts with small pictures."""
    small: int = 64
    """Their side in pixels."""
    large_gb: float = 2.0
    """GB of pictures of 512 pixels."""
    prompts_per_shard: int = 2_500
    """Prompts of a candidates' file."""
    keys: int = 100
    """Keys that are timed, after five that are not."""
    output: Path = Path("benchmarks/audit_pages.md")
    """Where the table goes (Markdown)."""


def main(args: Args) -> None:
    """Write the tables, serve them, press keys."""
    large = pictures(512)
    bytes_of_a_prompt = CANDIDATES_EACH * statistics.mean(map(len, large))
    cases = (
        (args.small, args.prompts, pictures(args.small)),
        (512, max(args.keys + 10, int(args.large_gb * 1e9 / bytes_of_a_prompt)), large),
    )
    lines = [
        "# From a key to the next prompt's pictures\n",
        f"Made by `python -m benchmarks.audit_pages {' '.join(sys.argv[1:])}` on {os.cpu_count()} {platform.machine()} CPU "
        f"cores, headless Chromium on the same machine; {args.keys} keys, {CANDIDATES_EACH} candidates a prompt. The "
        "server's memory and its CPU time for a key hold the next prompt's preloading.\n",
        "| pictures | prompts | GB of candidates | first page, s | key to pictures, ms: median, 95 % | server CPU a key, ms | "
        "server memory, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for side, prompts, files in cases:
        with tempfile.TemporaryDirectory() as folder:
            run = write_run(Path(folder) / "results" / "bench", prompts, side, files, args)
            lines.append(
                f"| {side} px | {prompts} | {gigabytes(run)} | {measured(run, args.keys)} |"
            )
            print(lines[-1], flush=True)
    write_text(args.output, "\n".join(lines) + "\n")


def pictures(side: int) -> list[bytes]:
    """PNG files of smooth colours with some noise, which do not compress to nothing."""
    rng = np.random.default_rng(side)
    ramp = np.linspace(0, 1, side)[:, None, None] * rng.random((DIFFERENT, 1, 1, 3))
    waves = np.sin(np.arange(side) / 17)[None, None, :, None]
    found = []
    for number in range(DIFFERENT):
        clean = 110 * ramp[number] + 60 * waves[0] + 80
        noisy = clean + rng.normal(scale=4, size=(side, side, 3))
        found.append(encode_png(noisy.clip(0, 255).astype(np.uint8)))
    return found


def write_run(run: Path, prompts: int, side: int, files: Sequence[bytes], args: Args) -> Path:
    """An iteration's candidates, rewards and pairs."""
    rng = np.random.default_rng(0)
    folder = run / "iter01"
    latents = rng.normal(size=4 * (side // 8) ** 2).astype(np.float32)
    made: dict[str, Any] = {"arguments": {}}
    for shard, start in enumerate(range(0, prompts, args.prompts_per_shard)):
        numbers = range(start, min(prompts, start + args.prompts_per_shard))
        with (
            writing_table(folder / f"candidates/shard-{shard}.parquet", CANDIDATES,
                          stage="sample_candidates", **made) as images,
            writing_table(folder / f"scores/shard-{shard}.parquet", REWARDS,
                          stage="score_candidates", **made) as rewards,
        ):  # fmt: skip
            for number in numbers:
                rows = list(candidates(number, files, latents))
                images.write(rows)
                rewards.write([reward(row, rng) for row in rows])
    with writing_table(
        folder / "pairs.parquet", TRAINING_PAIRS, stage="select_pairs", **made
    ) as pairs:
        for number in range(prompts):
            pairs.write([pair(list(candidates(number, files, latents)), rng)])
    return run


def candidates(
    number: int, files: Sequence[bytes], latents: np.ndarray
) -> Iterator[dict[str, Any]]:
    """The rows of one prompt."""
    for candidate in range(CANDIDATES_EACH):
        place = number * CANDIDATES_EACH + candidate
        yield {
            "prompt_id": f"{number:016x}", "prompt": f"prompt number {number}", "candidate": candidate,
            "seed": place, "image": {"bytes": files[place * 7 % len(files)], "path": None},
            "latents": latents,
        }  # fmt: skip


def reward(row: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Some reward of a candidate."""
    gains = rng.normal(scale=1e-4, size=DRAWS)
    return {
        "prompt_id": row["prompt_id"], "candidate": row["candidate"], "reward": gains.mean(),
        "standard_error": gains.std() / DRAWS**0.5, "policy_errors": (0.1 - gains).tolist(),
        "reference_errors": [0.1] * DRAWS, "timesteps": list(range(50, 1000, 95)), "draw_seed": 1,
    }  # fmt: skip


def pair(rows: Sequence[dict[str, Any]], rng: np.random.Generator) -> dict[str, Any]:
    """The pair of a prompt: its first two candidates."""
    winner, loser = rows[:2]
    margin = abs(rng.normal(scale=1e-4))
    geometry = [512, 512, 0, 0, 512, 512]
    found: dict[str, Any] = {
        "pair_id": f"iter01-{winner['prompt_id']}", "prompt_id": winner["prompt_id"],
        "prompt": winner["prompt"], "source": "generated", "iteration": 1, "policy_digest": "0" * 16,
        "margin": margin, "margin_standard_error": 5e-5, "probability": 0.5 + 0.4 * rng.random(),
    }  # fmt: skip
    for side, row in (("winner", winner), ("loser", loser)):
        found |= {
            side: row["image"], f"{side}_candidate": row["candidate"], f"{side}_seed": row["seed"],
            f"{side}_score": 0.0, f"{side}_latents": row["latents"], f"{side}_geometry": geometry,
        }  # fmt: skip
    return found


def gigabytes(run: Path) -> str:
    """Of the candidates' files."""
    sizes = [path.stat().st_size for path in run.glob("iter01/candidates/*.parquet")]
    return f"{sum(sizes) / 1e9:.2f}"


def measured(run: Path, keys: int) -> str:
    """The cells of a row that are measured."""
    command = [sys.executable, "-m", "stages.audit", str(run), "--port", "0", "--no-open-browser"]
    started = time.perf_counter()
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        address = server.stdout.readline().split()[1]
        with browser(1280, 900) as driver:
            driver.set_script_timeout(60)
            driver.get(address)
            first = time.perf_counter() - started
            for _ in range(5):
                driver.execute_async_script(PRESS)
            process = psutil.Process(server.pid)
            before = sum(process.cpu_times()[:2])
            taken = sorted(driver.execute_async_script(PRESS) for _ in range(keys))
            cpu = sum(process.cpu_times()[:2]) - before
            memory = process.memory_info().rss / 1e6
    finally:
        server.terminate()
        server.communicate()
    return (
        f"{first:.1f} | {statistics.median(taken):.0f}, {taken[int(0.95 * (keys - 1))]:.0f} | "
        f"{1e3 * cpu / keys:.0f} | {memory:.0f}"
    )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
