"""What a session found -> the tables of report.txt. Knows no GPU."""


def text(whole):
    found = {record["stage"]: record.get("result") or {} for record in whole["stages"]}
    parts = [head(whole, found.get("machine", {})), stages(whole), parity(found.get("parity")), speeds(found),
             changes(found.get("changes")), changes(found.get("changes-fp8")), host(found.get("host")), several(found.get("several")), serving(found),
             benches(found),
             kernels("kernels against f64", found.get("kernels-check"), ("error", "bound", "repeats")),
             kernels("attention by warpgroups against f64", found.get("attention-check"), ("error", "bound", "repeats")),
             kernels("attention, time", found.get("attention-time"), ("microseconds", "rate", "share")),
             kernels("kernels, time", found.get("kernels-time"), ("microseconds", "rate", "share"))]
    return "\n\n".join(part for part in parts if part) + "\n"


def head(whole, machine):
    kind = "REHEARSAL: no figure here means anything\n" if whole["rehearsal"] else ""
    card = machine.get("card", {})
    return f"{kind}{card.get('name', '')}, driver {card.get('driver_version', '')}; {whole['seconds']} s"


def stages(whole):
    return table(["stage", "seconds", "limit", "ended"],
                 [[record["stage"], record.get("seconds"), record["limit_seconds"], record["ended"]] for record in whole["stages"]])


def parity(result):
    keys = ("loss_difference_max", "loss_bound", "cosine_min", "cosine_bound", "norm_ratio_min", "norm_ratio_max", "good")
    return result and table(["parity", *keys], [[name, *(of.get(key) for key in keys)] for name, of in result.items()])


def speeds(found):
    """Tokens/s of each contender, and how many times KAITO's."""
    rows = []
    kaito = found.get("kaito", {}).get("workloads", {})
    for name in ("hone", "hone-fp8", "hone-host-inputs", "hone-layer-inputs", "best", "liger", "unsloth", "kaito"):
        for workload, of in found.get(name, {}).get("workloads", {}).items():
            rate, base = of.get("tokens_per_second"), kaito.get(workload, {}).get("tokens_per_second")
            spread = of.get("step_seconds") or [None]
            gigabytes = lambda key: of[key] / 1e9 if key in of else None
            rows.append([name, workload, rate, rate / base if rate and base else None, of.get("step_seconds_median"),
                         min(spread) if spread[0] else None, max(spread) if spread[0] else None,
                         gigabytes("peak_allocated_bytes"), gigabytes("device_used_bytes"),
                         of.get("error", "").strip().split("\n")[-1][:60]])
    rows.sort(key=lambda row: row[1])
    return rows and table(["training", "workload", "tokens/s", "times kaito", "s median", "min", "max", "GB peak", "GB device", ""], rows)


def changes(result):
    """What each change saves, and what it takes."""
    if not result:
        return ""
    gigabytes = lambda side: side["peak_allocated_bytes"] / 1e9 if side.get("peak_allocated_bytes") else None
    rows = [[of["change"], of["workload"], of["without"]["step_seconds_median"], of["with"]["step_seconds_median"],
             of["saved_milliseconds"], of["without"]["launches_a_step"], of["with"]["launches_a_step"],
             gigabytes(of["without"]), gigabytes(of["with"]), "same losses" if of["same_losses"] else ""]
            for of in result["changes"]]
    return table([f"change in {result.get('precision', 'bf16')}", "workload", "s without", "s with", "ms saved", "launches without", "with", "GB without", "with", ""], rows)


def host(result):
    """The host's own time for a launch."""
    if not result:
        return ""
    keys = ("without", "launches", "microseconds_a_launch", "least", "most", "microseconds_a_pass")
    launches = table(["host: without", *keys[1:]], [[of[key] for key in keys] for of in result["host"]])
    keys = ("graphs", "launches_a_token", "microseconds_a_token")
    return launches + "\n" + table(["host: a token with graphs", *keys[1:]], [[of[key] for key in keys] for of in result["decode"]])


def several(result):
    """What each number of GPUs makes of the same work for each, and the share of the ideal speed."""
    if not result:
        return ""
    if "skipped" in result:
        return f"several GPUs: {result['skipped']}"
    keys = ("tokens_per_second", "efficiency", "step_seconds_median", "loss")
    rows = [[of["ranks"], *(of.get(key) for key in keys)] for of in result["several"]]
    return table(["several GPUs", "tokens/s", "efficiency", "s median", "loss"], rows) + "\n" + result.get("error", "")


def without(of, change):
    """The median rate of a case without a change, if it was measured."""
    rates = of.get(f"rates_without_{change}")
    return rates[len(rates) // 2] if rates else None


def serving(found):
    """Tokens/s decoded by each side, what adapters cost, and how many times the reference's."""
    rows = []
    reference = {of["batch"]: of["tokens_per_second"] for of in found.get("serve-reference", {}).get("serving", [])}
    for name in ("serve", "serve-reference"):
        result = found.get(name, {})
        base = {}
        for of in result.get("serving", []):
            rate = of["tokens_per_second"]
            base.setdefault(of["batch"], rate)
            beside = reference.get(of["batch"])
            rows.append([result.get("contender"), of["batch"], of["adapters"], rate, rate / beside if beside else None,
                         1 - rate / base[of["batch"]], without(of, "early"), without(of, "ahead"), without(of, "graphs"), without(of, "added"), of.get("launches_a_step"),
                         of.get("seconds_to_first"), result.get("first_token_after_start_seconds")])
    return rows and table(["serving", "batch", "adapters", "tokens/s", "times reference", "cost of adapters", "without early", "without ahead", "without graphs",
                           "adapters apart", "launches a step",
                           "s to first", "s from start to first"], rows)


def benches(found):
    rows = []
    for name, of in found.items():
        if name.startswith("bench-"):
            rows += [[name, key, value] for key, value in of.items() if isinstance(value, (int, float, str))]
    return rows and table(["hone bench", "", ""], rows)


def kernels(title, result, keys):
    if not result:
        return ""
    rows = [[case["name"], *(case.get(key) for key in keys), case.get("flag", "")] for case in result.get("cases", [])]
    rows.sort(key=lambda row: not row[-1])  # what is flagged comes first
    about = ", ".join(f"{key} {show(value)}" for key, value in result.items() if isinstance(value, (int, float, str)))
    return f"{about}\n" + table([title, *keys, ""], rows)


def show(value):
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e5 else f"{value:.0f}"
    return str(value)


def table(names, rows):
    cells = [[show(cell) for cell in row] for row in [names, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(names))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
