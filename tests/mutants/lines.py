"""The mutants: a file, a line of it, and the line that stands there instead."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

CORE = Path(__file__).resolve().parents[2] / "stages/core"


@dataclass(frozen=True)
class Mutant:
    """One wrong line."""

    file: str
    """Below `stages/core`."""
    right: str
    """Text that stands in the file once."""
    wrong: str
    """What stands there instead."""
    equal_because: str = ""
    """Why no test can notice it, if none can."""

    @property
    def name(self) -> str:
        """For the table."""
        return f"{self.file}: `{self.right.strip()}` becomes `{self.wrong.strip()}`"

    def digest(self) -> str:
        """Of the file and the change."""
        text = (CORE / self.file).read_text(encoding="utf-8")
        return hashlib.sha256("\0".join((text, self.right, self.wrong)).encode()).hexdigest()

    def problem(self) -> str:
        """Why the line cannot be changed; empty if it can."""
        times = (CORE / self.file).read_text(encoding="utf-8").count(self.right)
        return "" if times == 1 else f"{self.name}: it stands there {times} times"


def of(file: str, *changes: tuple[str, ...]) -> list[Mutant]:
    """The mutants of one file."""
    return [Mutant(file, *change) for change in changes]


MUTANTS = [
    *of(
        "method/noising.py",
        ("(torch.arange(num_draws, dtype=torch.float64) + jitter)", "torch.arange(num_draws, dtype=torch.float64)"),
        ("(position * num_timesteps).long()", "(position * (num_timesteps // 2)).long()"),
        ("timesteps = torch.randint(num_timesteps,", "timesteps = torch.randint(num_timesteps // 2,"),
        ("torch.randn((num_draws, *latents_shape), generator=rng)", "torch.rand((num_draws, *latents_shape), generator=rng)"),
        ("torch.randn((num_pairs, *latents_shape), generator=rng)", "torch.randn((1, *latents_shape), generator=rng).repeat(num_pairs, 1, 1, 1)"),
    ),
    *of(
        "method/objective.py",
        (".flatten(start_dim=1).mean(dim=1)", ".flatten(start_dim=1).sum(dim=1)"),
        ("return -0.5 * dpo_beta", "return -1.0 * dpo_beta"),
        ("return -0.5 * dpo_beta", "return 0.5 * dpo_beta"),
        ("gain_l = errors.policy_l - errors.reference_l", "gain_l = errors.policy_l - errors.reference_w"),
        ("(gain_w - gain_l)", "(gain_w + gain_l)"),
        ("share * functional.logsigmoid(-logit)", "share * functional.logsigmoid(logit)"),
        ("-(1 - share) * functional", "-(1 + share) * functional"),
        ("errors, settings.dpo_beta) - 0.5).square()", "errors, settings.dpo_beta) - 1.0).square()"),
        ("MAPO_SNR * error / torch.expm1", "error / torch.expm1"),
        ("settings.num_timesteps * margin", "margin"),
        ("return errors.policy_w - MAPO_WEIGHT * ratio", "return -MAPO_WEIGHT * ratio"),
    ),
    *of(
        "method/rewards.py",
        ("gain = reference_errors.astype(np.float64) - policy_errors.astype(np.float64)\n    return Implicit", "gain = policy_errors.astype(np.float64) - reference_errors.astype(np.float64)\n    return Implicit"),
        ("values.std(axis=1, ddof=1)", "values.std(axis=1)"),
        ("spread / np.sqrt(num_draws)", "spread / num_draws"),
        ("(gain[best] - gain[worst])[None]", "(gain[best] + gain[worst])[None]"),
        ("values @ weights / weights.sum()", "values @ weights / len(weights)"),
        ("(values - mean[:, None]) * weights", "(values - mean[:, None])"),
        ("np.sqrt(num_draws / (num_draws - 1)) if", "1.0 if"),
        ("-0.5 * dpo_beta * margin", "-dpo_beta * margin"),
        ("exact.std(axis=1).mean()", "exact.std()"),
    ),
    *of(
        "method/selection.py",
        ("best = int(np.argmax(scores))", "best = int(np.argmin(scores))"),
        ("len(scores) - 1 - int(np.argmin(scores[::-1]))", "int(np.argsort(scores)[1])"),
        ("if scores[first] >= scores[second]", "if scores[first] <= scores[second]"),
        ("size=2, replace=False", "size=2, replace=True"),
    ),
    *of(
        "method/mixing.py",
        ("num_generated * seed_fraction / (1 - seed_fraction)", "num_generated * seed_fraction"),
        ("np.random.default_rng(seed).permutation(num_available)", "np.arange(num_available)"),
    ),
    *of(
        "method/scoring.py",
        ("denoising_error(reference, target),", "denoising_error(policy, target),"),
        ("denoising_error(policy, reference),", "denoising_error(policy, target),"),
        ("noise = torch.cat([draws.noise.to(model.device)] * num_images)", "noise = draws.noise.to(model.device).repeat_interleave(num_images, dim=0)"),
        (".repeat_interleave(num_draws, dim=0)", ".repeat(num_draws, 1, 1, 1)"),
        ("target = model.target(rows, noise, timesteps)", "target = noise"),
    ),
    *of(
        "method/sampling.py",
        ("scheduler, \"init_noise_sigma\", 1.0", "scheduler, \"no_such_sigma\", 1.0", "DDPM's and DDIM's are 1"),
    ),
    *of(
        "method/allocation.py",
        ("return FLOOR + (1 - FLOOR) * shares", "return shares"),
        ("wanted = weights * spreads", "wanted = weights"),
        ("return 1 / density[", "return density["),
        ("format(place, f\"0{bits}b\")[::-1]", "format(place, f\"0{bits}b\")"),
        ("gaps.std(axis=1, ddof=1) / np.sqrt(num_draws)", "gaps.std(axis=1, ddof=1)"),
        ("is_above(best, parts) & is_above(parts, worst)", "is_above(best, parts) | is_above(parts, worst)"),
        ("parts[place, seen].mean() - full[:, seen].mean()", "parts[place, seen].mean()"),
    ),
    *of(
        "method/adaptive.py",
        ("active = active[~cannot_win_or_lose(parts, confidence)]", "pass"),
        ("(reference - policy) * weights[:num_draws]", "(reference - policy)"),
    ),
    *of(
        "method/calibration.py",
        ("signal_to_noise[middles] ** -power", "signal_to_noise[middles] ** power"),
        ("gain.mean() > gain.std() / np.sqrt(len(gain))", "gain.mean() > 0"),
        ("fit_shape(features[~is_held_out], shape)", "fit_shape(features, shape)"),
        ("np.where(bins == number, gains, 0.0).mean(axis=1)", "np.where(bins == number, gains, 0.0).sum(axis=1)"),
        ("(spreads[is_used] / spreads[is_used].max()) ** -shape.power", "(spreads[is_used] / spreads[is_used].max()) ** shape.power"),
        ("slope += strength * (np.r_[0.0, jumps] - np.r_[jumps, 0.0])", "pass"),
        ("return BinWeights(slopes / mean, mean), chosen", "return BinWeights(slopes / mean, 1.0), chosen"),
        ("return shuffled[np.searchsorted(different, prompts)]", "return rng.integers(NUM_FOLDS, size=len(prompts))"),
        ("weights, _ = fit(features[others], prompts[others], rng, shapes)", "weights, _ = fit(features, prompts, rng, shapes)"),
        ("optimize.brentq(slope, 0.0, 1.0)", "1.0"),
    ),
    *of(
        "method/listwise.py",
        ("(discount[:, None] - discount).abs()", "1.0"),
        ("torch.exp2(preference) - 1", "preference"),
        ("logits = -0.5 * dpo_beta * (moved", "logits = 0.5 * dpo_beta * (moved"),
        ("is_preferred = preference[:, None] > preference", "is_preferred = preference[:, None] >= preference", "of two equal images the gains are equal, so that their weight is 0"),
        ("(max(high, low), min(high, low))", "(high, low)"),
    ),
    *of(
        "method/online_objective.py",
        ("np.tanh((best - worst) / 2) > min_gap", "best - worst > min_gap"),
        ("clipped_log(log_ratio_w, ratio_clip) - clipped_log(log_ratio_l, ratio_clip)", "log_ratio_w - log_ratio_l"),
        ("np.log1p(-ratio_clip), np.log1p(ratio_clip)", "-ratio_clip, ratio_clip"),
        ("torch.maximum(", "torch.minimum("),
        ("(base.std() + SMALL)", "1.0"),
        ("deque(maxlen=self.buffer_size)", "deque()"),
        ("len(own) >= self.min_count", "len(own) > self.min_count"),
    ),
    *of(
        "method/gaussian_steps.py",
        ("(1 - after) / (1 - kept) * (1 - kept / after)", "(1 - after) / (1 - kept)"),
        ("(1 - after - sigma.square()).clamp(min=0).sqrt()", "(1 - after).sqrt()"),
        ("after.sqrt().to(dtype) * clean", "root * clean"),
        ("root * noisy - rest * predicted, root * predicted + rest * noisy", "root * noisy - rest * predicted, predicted"),
        ("density - step.sigma.log() - 0.5", "density + step.sigma.log() - 0.5"),
        ("/ (2 * policy.sigma.square())", "/ policy.sigma.square()"),
    ),
    *of(
        "method/flow_steps.py",
        ("pull * before * (before - after)", "pull * (before - after)"),
        ("pull / 2, before - after", "pull, before - after"),
        ("x + (1 - s) * velocity", "x + velocity"),
        ("x - (velocity + half * noise) * length", "x - (velocity - half * noise) * length"),
        ("x - s * velocity", "x - velocity"),
        ("torch.where(self.levels[:-1] > 1 - 1e-6,", "torch.where(self.levels[:-1] == 1,"),
        ("(levels.diff() < 0).all()", "True"),
    ),
    *of(
        "method/trajectories.py",
        ("start if first == then else generator(then)", "generator(then)"),
    ),
    *of(
        "method/secant.py",
        ("(ahead - behind) / self.stretch, target", "(ahead - behind), target"),
        ("(to - ours) * (stretch / 2)", "(to - ours) * stretch"),
        ("if not moved < least:", "if moved < least:"),
    ),
    *of(
        "method/noising.py",
        ("torch.sigmoid(torch.special.ndtri(position))", "torch.sigmoid(position)"),
        ("np.cumsum(density) / density.sum()", "np.cumsum(np.ones_like(density)) / len(density)"),
    ),
    *of(
        "models/interface.py",
        ("without + guidance_scale * (with_text - without)", "with_text + guidance_scale * (with_text - without)"),
        ("is_guided = guidance_scale != 1.0", "is_guided = guidance_scale > 1.0", "a guidance scale below 1 is refused by the config's schema; no preset has one"),
    ),
    *of(
        "method/derivative.py",
        ("value + self.direction[name] * (share / self.scale)", "value - self.direction[name] * (share / self.scale)"),
    ),
    *of(
        "training/pair_losses.py",
        ("torch.where(dropped, len(pairs.text) - 1, pairs.caption[rows])", "pairs.caption[rows]"),
        ("torch.cat([draws.noise] * 2)", "torch.cat([draws.noise, draws.noise.flip(0)])"),
        ("torch.cat([pairs.winner[rows], pairs.loser[rows]])", "torch.cat([pairs.loser[rows], pairs.winner[rows]])"),
        ("target = model.target(latents, noise, timesteps)", "target = noise"),
        ('"implicit_accuracy": (logit > 0)', '"implicit_accuracy": (logit >= 0)'),
        ("(errors.policy_l - errors.reference_l).mean()", "(errors.policy_w - errors.reference_w).mean()"),
        ("prediction = model.predict(reference, noised", "prediction = model.predict(policy, noised"),
    ),
    *of(
        "training/loop.py",
        ("group[\"lr\"] = rate", "pass"),
        ("clip_grad_norm_(self.parameters, settings.gradient_clip)", "clip_grad_norm_(self.parameters, 1e9)"),
        ("self.average.step(self.parameters)", "pass"),
        ("self.average.copy_to(self.parameters)", "pass"),
        ("weight = len(rows[part]) / len(rows)", "weight = 1 / len(parts)"),
        ("loss = measures[\"loss\"] * weight", "loss = measures[\"loss\"]"),
        ("self.optimizer.zero_grad(set_to_none=True)", "pass"),
        ("math.ceil(settings.warmup_share * total)", "0"),
        ("min(1.0, step / warmup if warmup else 1.0)", "1.0"),
        ("seed_of(seed, \"order\", number)", "seed_of(seed, \"order\")"),
        ("generator=rng) < share", "generator=rng) > share"),
        ("seed_of(self.seed, \"draws\", number)", "seed_of(self.seed, \"draws\")"),
        ("self.kept.put_back()", "pass"),
        ("self.policy.freeze()", "pass"),
    ),
    *of(
        "training/early_stopping.py",
        ("(means[place], place)", "(means[place], -place)"),
        ("    if lowest == 0:", "    if lowest == -1:"),
        ("    return max(", "    return min("),
        ("<= standard_error(", "< -standard_error("),
        ("/ math.sqrt(count)", ""),
        ("kept_score(scores) == len(scores) - 1", "True"),
        (">= self._patience", "> self._patience"),
    ),
    *of(
        "training/held_out.py",
        (".reshape(self.num_draws, len(self.pairs)).mean(dim=0)", ".reshape(len(self.pairs), self.num_draws).mean(dim=1)"),
        ("log_losses(softening * logit", "log_losses(-softening * logit"),
        ("known.get(start)", "known.get(0)"),
        ("(errors.policy_l - errors.reference_l).mean()", "(errors.policy_l - errors.reference_w).mean()"),
        ("+ 0.5 * (logit == 0).float()", ""),
    ),
    *of(
        "training/optimizers.py",
        ("weight_decay=weight_decay, fused", "weight_decay=0.0, fused"),
        ("scale_parameter=False", "scale_parameter=True"),
    ),
    *of(
        "evaluation/statistics.py",
        ("share * sums.sum() / counts.sum()", "share * (sums / counts).mean()"),
        ("sums[chosen].sum(axis=1) / counts[chosen].sum(axis=1)", "(sums[chosen] / counts[chosen]).mean(axis=1)"),
        ("(drawn < estimate).mean() + (drawn <= estimate).mean()) / 2", "(drawn > estimate).mean() + (drawn >= estimate).mean()) / 2"),
        ("cubes / (6 * squares**1.5)", "-cubes / (6 * squares**1.5)"),
        ("np.arange(len(p_values), 0, -1)", "len(p_values)"),
        ("np.maximum.accumulate(steps)", "steps"),
        ("differences.std(ddof=1))", "differences.std())"),
        ("0.5 * (differences == 0).mean()", "0.0 * (differences == 0).mean()"),
        ("len(points) * coin / found", "len(points)"),
        ("zero_method=\"zsplit\"", "zero_method=\"wilcox\""),
        ("variance = number / (number - 1) * float", "variance = float"),
        ("special.ndtri(0.975) / special.stdtrit(number - 1, 0.975)) ** 2", "1.0) ** 2"),
        ("min(count, shrink * coin / variance)", "shrink * coin / variance"),
        ("certainty = np.maximum(values, 1 - values)", "certainty = values"),
        ("& (np.ptp(truth, axis=1) > 0)", ""),
    ),
    *of(
        "evaluation/judge_guards.py",
        ("points = (gain > 0) + 0.5 * (gain == 0)\n    low, high", "points = (gain >= 0) + 0.0 * (gain == 0)\n    low, high"),
        ("points = (gain > 0) + 0.5 * (gain == 0)\n    return dict", "points = (gain >= 0) + 0.0 * (gain == 0)\n    return dict"),
        ("if low > limit:", "if high > limit:"),
        ("[probability > CONFIDENT", "[probability >= 0.5"),
        ("(found > 0) + 0.5 * (found == 0)", "found > 0"),
        ('scores[p["prompt_id"]][p["winner_candidate"]] - scores[p["prompt_id"]][p["loser_candidate"]]', 'scores[p["prompt_id"]][p["loser_candidate"]] - scores[p["prompt_id"]][p["winner_candidate"]]'),
    ),
    *of(
        "evaluation/image_guards.py",
        ('if not row["diversity"] < limit * seed["diversity"]', 'if not row["diversity"] < limit'),
        ('sum(row["num_images"] for row in rows)', 'len(rows)'),
        ("return max(shares, default=None)", "return min(shares, default=None)"),
    ),
    *of(
        "evaluation/gates.py",
        ('on_collapse == "stop" or last_good == BASE', 'on_collapse == "stop"'),
        ('row["policy"] if not findings', 'row["policy"] if findings'),
    ),
    *of(
        "evaluation/verdicts.py",
        ("farthest = max(abs(self.ci_low), abs(self.ci_high))", "farthest = abs(self.difference)"),
        ('return "lower" if self.ci_high < 0', 'return "lower" if self.ci_low < 0'),
    ),
]  # fmt: skip
