"""The figures of `data/runs/bench.json`, computed from its raw seconds.

Importing this registers the summary, so that `store.recompute` finds it.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from maintenance.store import SUMMARIES

UNIT = "real tokens a second"
# The first pattern that an operator's name contains decides; the order matters.
KINDS = (
    ("optimiser", ("_fused_adamw", "_foreach", "clip_grad", "linalg_vector_norm")),
    ("attention", ("softmax", "bmm", "baddbmm", "scaled_dot_product")),
    ("loss", ("log_softmax", "nll_loss")),
    ("matrix products", ("mm", "gemm", "linear", "matmul", "4bit")),
    ("copies and casts", ("copy_", "to_copy", "cat", "clone", "index", "fill", "zero")),
)


def kind_of(name: str) -> str:
    """The kind of work an operator does.

    >>> kind_of("aten::addmm"), kind_of("aten::_log_softmax"), kind_of("aten::mul")
    ('matrix products', 'loss', 'other arithmetic')
    """
    name = name.removeprefix("aten::")
    if "log_softmax" in name:
        return "loss"
    for kind, patterns in KINDS:
        if any(pattern in name for pattern in patterns):
            return kind
    return "other arithmetic"


def shares(events: dict[str, float], wall: float) -> dict[str, float]:
    """Shares of a step's wall seconds by kind; what no operator ran is Python's.

    Args:
        events: operator -> own seconds.
        wall: seconds of the step.

    >>> step = shares({"aten::mm": 6.0, "aten::copy_": 2.0}, 10.0)
    >>> step["matrix products"], round(step["Python"], 3)
    (0.6, 0.2)
    """
    share_of = dict.fromkeys([kind for kind, _ in KINDS] + ["other arithmetic"], 0.0)
    for name, seconds in events.items():
        share_of[kind_of(name)] += seconds / wall
    return share_of | {"Python": max(0.0, 1 - sum(share_of.values()))}


def part_of(run: dict) -> str:
    """The part of the benchmark that a run belongs to."""
    return run["settings"]["part"]


def speed(run: dict) -> float:
    """Real tokens a second of a training, its first step left out.

    Of several processes at once: of all together.
    """
    seconds, tokens = run["measured"]["step_seconds"], run["measured"]["tokens"]
    if seconds and not isinstance(seconds[0], list):
        seconds, tokens = [seconds], [tokens]
    return sum(
        sum(t[1 : len(s)]) / sum(s[1:]) for s, t in zip(seconds, tokens, strict=True)
    )


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, least and greatest, and of how many.

    >>> spread([3.0, 1.0, 2.0])
    {'median': 2.0, 'least': 1.0, 'most': 3.0, 'rounds': 3}
    """
    values = list(values)
    return {
        "median": statistics.median(values),
        "least": min(values),
        "most": max(values),
        "rounds": len(values),
    }


def ratios(above: dict[int, float], below: dict[int, float]) -> dict[str, float]:
    """The spread of the ratios in each round that has both.

    Two things measured one after the other meet the same neighbours on the machine.
    """
    both = sorted(above.keys() & below.keys())
    return spread([above[number] / below[number] for number in both])


def _by_name(runs: Sequence[dict], part: str, value: Any) -> dict[str, dict[int, Any]]:
    values: dict[str, dict[int, Any]] = defaultdict(dict)
    for run in runs:
        if part_of(run) == part:
            values[run["settings"]["name"]][run["seed"]] = value(run)
    return dict(values)


def _training(runs: Sequence[dict]) -> dict[str, Any]:
    speeds: dict[str, dict] = {}
    against: dict[str, dict] = {}
    losses: dict[str, dict] = {}
    methods = dict.fromkeys(
        run["settings"]["method"] for run in runs if part_of(run) == "training"
    )
    for method in methods:
        own = [r for r in runs if r["settings"].get("method") == method]
        by_path = _by_name(own, "training", speed)
        speeds[method] = {name: spread(f.values()) for name, f in by_path.items()}
        if "course" in by_path:
            against[method] = {
                name: ratios(by_path["course"], other)
                for name, other in by_path.items()
                if name != "course" and by_path["course"].keys() & other.keys()
            }
        loss = _by_name(own, "training", lambda run: run["loss"])
        losses[method] = {
            name: {"first": f[min(f)][0], "last": f[min(f)][-1]}
            for name, f in loss.items()
        }
    return {"tokens_per_s": speeds, "course_against": against, "losses": losses}


def _beside(run: dict) -> dict[int, float]:
    """By step, how fast the course's was against the bare loop's; without the first."""
    measured = run["measured"]
    course, bare = (
        [t / s for t, s in zip(tokens, seconds, strict=False)]
        for tokens, seconds in (
            (measured["course_tokens"], measured["course_s"]),
            (measured["bare_loop_tokens"], measured["bare_loop_s"]),
        )
    )
    pairs = list(zip(course, bare, strict=False))
    return {step: c / b for step, (c, b) in enumerate(pairs) if step}


def _taken_away(runs: Sequence[dict]) -> dict[str, dict]:
    """Shares of the course's speed, both taken against the bare loop beside them."""
    ablations = _by_name(runs, "ablation", _beside)
    ratios_of = {name: by_seed[0] for name, by_seed in ablations.items()}
    plain = ratios_of.pop("the course's path", None)
    if plain is None:
        return {}
    usual = statistics.median(plain.values())
    return {
        name: spread(ratio / usual for ratio in steps.values())
        for name, steps in ratios_of.items()
    }


def _answers(runs: Sequence[dict]) -> dict[str, Any]:
    singles = [r for r in runs if _is(r, "answers", "one by one")]
    batched = [r for r in runs if _is(r, "answers", "batched")]
    if not singles or not batched:
        return {}
    alone = {r["seed"]: r["seconds"] / r["measured"]["answers"] for r in singles}
    together = {r["seed"]: r["seconds"] / r["measured"]["answers"] for r in batched}
    texts = dict(
        zip(batched[0]["measured"]["chosen"], batched[0]["predictions"], strict=True)
    )
    pairs = [
        (texts[place], text)
        for run in singles
        for place, text in zip(
            run["measured"]["chosen"], run["predictions"], strict=True
        )
    ]
    views = [r for r in runs if _is(r, "answers", "batched, by a view")]
    viewed = {r["seed"]: r["seconds"] / r["measured"]["answers"] for r in views}
    by_view = {"batched_against_by_a_view": ratios(viewed, together)} if viewed else {}
    return by_view | {
        "one_by_one_s_each": spread(alone.values()),
        "batched_s_each": spread(together.values()),
        "batched_against_one_by_one": ratios(alone, together),
        "compared": len(pairs),
        "different": sum(a != b for a, b in pairs),
    }


def _is(run: dict, part: str, name: str) -> bool:
    return part_of(run) == part and run["settings"]["name"] == name


def _compiled(run: dict) -> dict[str, float]:
    """What compiling costs, what a step saves, and after how many steps it pays."""
    plain = statistics.median(run["measured"]["plain_seconds"][1:])
    first, *rest = run["measured"]["compiled_seconds"]
    compiled = statistics.median(rest)
    saved = plain - compiled
    costs = {"plain_s": plain, "compiled_s": compiled, "own_cost_s": first - compiled}
    costs["ratio"] = plain / compiled
    if saved > 0:
        costs["pays_after_steps"] = (first - compiled) / saved
    return costs


def _failed(run: dict) -> str | None:
    return run["measured"].get("failed")


def _by_turn(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """The spread of ratios of what was measured in turn."""
    pairs = zip(above, below, strict=False)
    return spread(a / b for a, b in pairs)


def _rival(run: dict) -> dict[str, Any]:
    """Course ÷ bare loop on other layers, and that loop's losses; or the error.

    Where no pair but the first was taken, that one counts.
    """
    if failed := _failed(run):
        return {"failed": failed}
    found: dict[str, Any] = {}
    by_step = _beside(run) or _beside(run | {"measured": _twice(run["measured"])})
    found["course_against"] = spread(by_step.values())
    losses = run["measured"]["bare_loop_loss"]
    pairs = list(zip(losses, run["loss"], strict=False))
    found["loss"] = {"first": losses[0], "last": losses[-1]}
    found["loss_from_course"] = max(abs(a - b) for a, b in pairs)
    found["trains"] = len(losses) > 1 and losses[-1] < losses[0]
    return found


def _twice(measured: dict) -> dict:
    return {key: value[:1] * 2 for key, value in measured.items() if key[-1] in "sn"}


def _products(run: dict) -> dict[str, Any]:
    """Share of a step that its products take alone, and speed against float32.

    `share` is of the training's own arithmetic, `share_with_others` with the products
    of adapters and attention.
    """
    measured = run["measured"]
    steps, seconds = measured["step_s"], measured["product_s"]
    own, others = seconds[measured["own"]], seconds["others"]
    both = [a + b for a, b in zip(own, others, strict=True)]
    flops = measured["operations"]["frozen"] / 1e9
    return {
        "share": _by_turn(own, steps),
        "share_with_others": _by_turn(both, steps),
        "against_float32": {
            name: _by_turn(seconds["float32"], found)
            for name, found in seconds.items()
            if name not in ("float32", "others")
        },
        "gflops": {
            name: spread(flops / s for s in found)
            for name, found in seconds.items()
            if name != "others"
        },
        "failed": measured["failed"],
    }


def _neighbours(runs: Sequence[dict]) -> dict[str, Any]:
    """What newer parts found; a record without them has none of these keys."""
    found: dict[str, Any] = {}
    for run in runs:
        part, name = part_of(run), run["settings"]["name"]
        if part == "block":
            found["compiled_block"] = _block(run)
        elif part == "products":
            found["products"] = _products(run)
        elif part == "int8":
            found.setdefault("int8", {})[name] = _rival(run)
        elif part == "company":
            pairs = found.setdefault("beside_a_busy_process", {}).setdefault(name, [])
            measured = run["measured"]
            both = zip(measured["beside_s"], measured["alone_s"], strict=True)
            pairs += [beside / alone for beside, alone in both]
        elif part == "server" and (failed := _failed(run)):
            found["server"] = {"failed": failed}
        elif part == "server":
            measured = run["measured"]
            own, others = measured["course_s"][1:], measured["server_s"][1:]
            each = spread(seconds / measured["answers"] for seconds in own)
            found["server"] = {"course_against": _by_turn(others, own), "s_each": each}
    if company := found.get("beside_a_busy_process"):
        found["beside_a_busy_process"] = {n: spread(p) for n, p in company.items()}
    return found


def _block(run: dict) -> dict[str, Any]:
    """Course ÷ compiled bare loop once compiled, and the seconds of compiling."""
    if failed := _failed(run):
        return {"failed": failed}
    first = run["measured"]["bare_loop_s"]
    usual = statistics.median(first[3:])
    later = {step: ratio for step, ratio in _beside(run).items() if step > 2}
    cost = sum(first[:3]) - 3 * usual
    return {"course_against": spread(later.values()), "own_cost_s": cost}


def summarise(runs: list[dict]) -> dict[str, Any]:
    """Every figure that `make bench` prints, and that prose may quote.

    Returns:
        `tokens_per_s`, `course_against`, `losses` by method and path;
        `course_against_bare_loop` step beside step; `taken_away`, the share of the
        course's speed that is left without an ingredient; `threads`;
        `compile`; `seconds` of single things; `answers`; `profile` by method; of the
        parts that were measured `compiled_block`, `products`, `int8`, `server`,
        `beside_a_busy_process`.
    """
    summary = _training(runs)
    summary["course_against_bare_loop"] = {
        r["settings"]["method"]: spread(_beside(r).values())
        for r in runs
        if part_of(r) == "pairs"
    }
    summary["taken_away"] = _taken_away(runs)
    threads = _by_name(runs, "threads", speed)
    summary["threads"] = {name: spread(f.values()) for name, f in threads.items()}
    compiled = [run for run in runs if part_of(run) == "compile"]
    if compiled:
        summary["compile"] = _compiled(compiled[0])
    summary["seconds"] = {
        name: spread(seconds.values())
        for name, seconds in _by_name(runs, "start", lambda run: run["seconds"]).items()
    }
    waits = [
        statistics.median(run["measured"]["waits"])
        for run in runs
        if _is(run, "answers", "first token")
    ]
    if waits:
        summary["seconds"]["first token"] = spread(waits)
    summary["answers"] = _answers(runs)
    summary["profile"] = {
        run["settings"]["method"]: shares(
            run["measured"]["operators"], run["measured"]["wall"]
        )
        for run in runs
        if part_of(run) == "profile"
    }
    lessons = _by_name(runs, "lessons", lambda run: run["seconds"])
    summary["lessons"] = {name: by_round[0] for name, by_round in lessons.items()}
    if lessons:
        summary["lessons_s"] = sum(summary["lessons"].values())
    return summary | _neighbours(runs)


SUMMARIES["bench"] = summarise


def table(summary: dict[str, Any]) -> list[str]:
    """The summary as lines to print."""
    lines = [f"training, {UNIT}, median (least to most), course ÷ path, losses"]
    for method, speeds in summary.get("tokens_per_s", {}).items():
        for name, figures in speeds.items():
            ratio = summary["course_against"].get(method, {}).get(name)
            loss = summary["losses"][method][name]
            lines.append(
                f"  {method:<6}{name:<14}{_spread(figures, 0)}"
                f"  {_ratio(ratio):<22}{loss['first']:.3f} to {loss['last']:.3f}"
            )
    for method, figures in summary.get("course_against_bare_loop", {}).items():
        lines.append(
            f"  {method:<6}course ÷ bare loop, step by step  {_ratio(figures)}"
        )
    lines.append("LoRA without …, share of the course's speed that is left")
    for name, figures in summary.get("taken_away", {}).items():
        lines.append(f"  {name:<32}{_ratio(figures)}")
    lines.append(f"threads, {UNIT}, all processes together")
    for name, figures in summary.get("threads", {}).items():
        lines.append(f"  {name:<32}{_spread(figures, 0)}")
    if costs := summary.get("compile"):
        pays = costs.get("pays_after_steps")
        after = f"pays after {pays:.0f} steps" if pays else "never pays"
        lines.append(
            f"torch.compile: {costs['plain_s']:.2f} s a step becomes "
            f"{costs['compiled_s']:.2f} s and costs {costs['own_cost_s']:.0f} s once: "
            f"{after}"
        )
    lines.append("seconds")
    for name, figures in summary.get("seconds", {}).items():
        lines.append(f"  {name:<32}{_spread(figures, 3)}")
    if answers := summary.get("answers"):
        for way in ("one_by_one", "batched"):
            name = f"an answer, {way.replace('_', ' ')}"
            lines.append(f"  {name:<32}{_spread(answers[f'{way}_s_each'], 3)}")
        ratio = _ratio(answers["batched_against_one_by_one"])
        lines.append(
            f"  batched is faster by {ratio}; {answers['different']} of "
            f"{answers['compared']} answers differ"
        )
        if view := answers.get("batched_against_by_a_view"):
            lines.append(f"  batched, and by a view: {_ratio(view)}")
    for method, kinds in summary.get("profile", {}).items():
        parts = [f"{kind} {share:.0%}" for kind, share in kinds.items()]
        lines.append(f"profile of a {method} step: {', '.join(parts)}")
    lines += _limits(summary)
    for name, seconds in summary.get("lessons", {}).items():
        lines.append(f"  lesson {name:<25}{seconds:8.0f} s")
    return lines


def _limits(summary: dict[str, Any]) -> list[str]:
    """How near the limit, and what others do."""
    lines = []

    def against(name: str, found: dict) -> None:
        said = found.get("failed") or _ratio(found["course_against"])
        if "trains" in found:
            loss = found["loss"]
            said += f", losses {loss['first']:.3f} to {loss['last']:.3f}"
        lines.append(f"course ÷ {name}: {said}")

    if found := summary.get("products"):
        lines.append(
            f"products with frozen weights alone are {_ratio(found['share'])} of a "
            f"step, with all others {_ratio(found['share_with_others'])}"
        )
        for name, ratio in found["against_float32"].items():
            lines.append(f"  products in {name} ÷ float32, speed: {_ratio(ratio)}")
        for name, error in found["failed"].items():
            lines.append(f"  products in {name}: {error}")
    if found := summary.get("compiled_block"):
        against("bare loop with a compiled block", found)
    for name, found in summary.get("int8", {}).items():
        against(f"8-bit layers of {name}", found)
    if found := summary.get("server"):
        against("llama.cpp's server, Q8_0, 8 at once", found)
    for name, found in summary.get("beside_a_busy_process", {}).items():
        lines.append(f"a step beside a busy process ÷ alone, {name}: {_ratio(found)}")
    return lines


def _spread(figures: dict, digits: int) -> str:
    middle, least, most = figures["median"], figures["least"], figures["most"]
    return f"{middle:8.{digits}f} ({least:.{digits}f} to {most:.{digits}f})"


def _ratio(figures: dict | None) -> str:
    if figures is None:
        return ""
    return f"{figures['median']:.2f} ({figures['least']:.2f} to {figures['most']:.2f})"
