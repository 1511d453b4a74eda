"""How things look for people: tables, and the live view of a run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from shoal.node.api.schemas import (
    BenchResult,
    CurvePoint,
    DoctorInfo,
    MemberInfo,
    NatInfo,
    NodeInfo,
    PeerInfo,
    PingResult,
    SwarmDetail,
    SwarmSummary,
)

if TYPE_CHECKING:  # the command that shows them has loaded NumPy; the others have not
    from shoal.training.algorithms.catalogue import Details, Entry

ENDED: Final = ("done", "failed", "left")
"""The phases after which nothing changes any more."""
ENDLESS_STEPS: Final = 2**50
"""After so many a run of people's own training loops ends: none of them will see it."""
ALONE: Final = "bold black on yellow"
SHORT_SWARM_CHARS: Final = 18  # all CIDs of manifests begin with the same 9
SHORT_PEER_CHARS: Final = 8
_BLOCKS: Final = " ▁▂▃▄▅▆▇█"
_EIGHTHS: Final = " ▏▎▍▌▋▊▉"
_BAR_WIDTH: Final = 10
_CURVE_WIDTH: Final = 60
_CURVE_ROWS: Final = 6


def short_swarm(swarm: str) -> str:
    """The beginning of a swarm's name: enough to tell it apart, and accepted by every command."""
    return swarm[:SHORT_SWARM_CHARS]


def short_peer(peer: str) -> str:
    """The end of a peer's name; they all begin alike."""
    return f"…{peer[-SHORT_PEER_CHARS:]}"


def ready(answer: dict[str, Any], *, detached: bool) -> RenderableType:
    """A node that has started."""
    lines = [f"node [bold]{answer['peer_id']}[/] is up (profile {answer['profile']}, pid {answer['pid']})"]
    lines += [f"  {escape(address)}" for address in answer["addresses"]]
    lines.append("[dim]`shoal down` stops it[/]" if detached else "[dim]Ctrl-C ends it[/]")
    return "\n".join(lines)


def explained(rows: Sequence[tuple[str, float, str]]) -> RenderableType:
    """Figures by name, and what each means."""
    table = Table.grid(padding=(0, 2))
    for name, value, meaning in rows:
        table.add_row(f"[bold]{name.replace('_', ' ')}[/]", f"{value:,}", f"[dim]{escape(meaning)}[/]")
    return table


def algorithms(found: Sequence[Entry]) -> Table:
    """Ways to learn, one a line."""
    table = Table.grid(padding=(0, 2))
    for each in found:
        table.add_row(f"[bold]{escape(each.name)}[/]", escape(each.summary), f"[dim]{escape(each.paper)}[/]")
    return table


def algorithm(found: Details) -> RenderableType:
    """One way to learn, and all that can be set of it."""
    table = Table("setting", "default", "else", "range", "what it is", box=None, header_style="dim")
    for each in found.settings:
        other = ", ".join(f"{_as_json(value)} ({where})" for where, value in each.defaults.items())
        limits = "" if each.low is None or each.high is None else f"{each.low:g} to {each.high:g}"
        row = (f"[bold]{escape(each.name)}[/]", _as_json(each.default), other, limits, each.summary)
        table.add_row(row[0], *map(escape, row[1:]))
    title = f"[bold]{escape(found.name)}[/], version {found.version}: {escape(found.summary)}  [dim]{found.paper}[/]"
    return Group(title, "", escape(found.about), "", table)


def _as_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def bench_reduce(figures: dict[str, Any]) -> Table:
    """What an all-reduce took."""
    table = Table.grid(padding=(0, 2))
    same = "the same bytes everywhere" if figures["bit_identical"] else "[red]not the same everywhere[/red]"
    table.add_row("peers, values", f"{figures['peers']}, {figures['numel']:,} as {figures['codec']}")
    table.add_row("a round (median)", f"{figures['seconds_median']:.3f} s")
    table.add_row("bus bandwidth of each", f"{figures['bus_mb_s_per_peer']:,.0f} MB/s")
    wire, lanes = figures["wire_mb_s_per_peer"], figures["lane_mb_s"]
    alone = "not measured, as a peer was gone" if lanes is None else f"{lanes:,.0f}"
    table.add_row("on the wire of each", f"{wire:,.0f} MB/s; the same lanes alone {alone}")
    table.add_row("result", f"{same}; at most {figures['max_error']:.2g} from the exact mean")
    return table


def bench_actor(figures: dict[str, Any]) -> Table:
    """What an actor's worker does on this machine."""
    table = Table.grid(padding=(0, 2))
    table.add_row("acts for", f"{figures['algorithm']} in {figures['task']}")
    table.add_row("environment steps", f"{figures['env_steps_per_s']:,.0f} a second, with making and signing shards")
    table.add_row("a step of a shard", f"{figures['bytes_per_step']:,.1f} bytes")
    table.add_row("memory", f"{figures['memory_mb']:,.0f} MB at most, of the worker; the node has its own")
    return table


def bench_dht(figures: dict[str, Any]) -> Table:
    """What the DHT took."""
    table = Table.grid(padding=(0, 2))
    table.add_row("nodes", f"{figures['nodes']}, of which {figures['killed']} were killed")
    table.add_row("look-ups that found what is there", f"{100 * figures['success']:.1f} %")
    for what, word in (("put", "a name put"), ("get", "got"), ("provide", "a content announced"), ("find", "found")):
        table.add_row(f"{word} (median)", f"{figures[f'{what}_ms']:.1f} ms")
    return table


def bench(result: BenchResult) -> RenderableType:
    """What was measured of the wire."""
    facts = Table.grid(padding=(0, 2))
    facts.add_row("carried by", f"{result.transport} ({result.security}), {result.path}")
    if result.kind == "rpc":
        facts.add_row("calls", f"{result.calls_per_s:,.0f} a second, of {result.size:,} bytes")
        facts.add_row("latency", f"p50 {result.p50_ms:.3f} ms, p99 {result.p99_ms:.3f} ms")
    if result.mb_per_s is not None:
        facts.add_row(
            "bytes", f"{result.mb_per_s:,.1f} MB/s " + ("there and back" if result.kind == "rpc" else "one way")
        )
        facts.add_row("CPU", f"{result.cpu_s_per_gb:,.2f} s per GB, both nodes together")
    if result.ratio_p99 is not None:
        beside = f"{result.loaded_p99_ms:.3f} ms beside a transfer: {result.ratio_p99:.2f} times as long"
        facts.add_row("small calls", f"p99 {result.idle_p99_ms:.3f} ms alone, {beside}")
        facts.add_row("transfer", f"{result.transfer_mb_per_s:,.1f} MB/s meanwhile")
    if result.sender_memory_mb is not None:
        grown = f"sender {result.sender_memory_mb:,.1f} MB, receiver {result.receiver_memory_mb:,.1f} MB"
        facts.add_row("memory", f"{grown}, beyond the buffers")
    return facts


def status(info: NodeInfo, swarms_: Sequence[SwarmSummary]) -> RenderableType:
    """This node, and its swarms."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column()
    facts.add_column(overflow="fold")
    facts.add_row("node", f"[bold]{info.peer_id}[/]")
    facts.add_row("addresses", escape("\n".join(info.addresses) or "none"))
    facts.add_row("peers", str(info.num_peers))
    facts.add_row("up", duration(info.uptime_s))
    facts.add_row("profile", f"{info.profile} (pid {info.pid}, Shoal {info.version})")
    if not info.can_train:
        facts.add_row("learning", "[yellow]no: this node only stores; pip install 'shoal\\[train]' to learn[/]")
    parts: list[RenderableType] = [facts]
    if info.alone:
        parts.append(alone_line("no other node is connected to this one"))
    if swarms_:
        parts.append(swarms(swarms_))
    return Group(*parts)


def peers(found: Sequence[PeerInfo]) -> RenderableType:
    """Whom the node is connected to."""
    if not found:
        return "no peers: hand out a ticket, or `shoal join` one"
    table = _table("peer", "path", "address", ">rtt", ">connected", "swarms in common")
    for peer in found:
        rtt = "" if peer.rtt_ms is None else f"{peer.rtt_ms:.1f} ms"
        common = " ".join(short_swarm(swarm) for swarm in peer.swarms)
        address = peer.address.partition("/p2p/")[0]
        if peer.relayed_by is not None:
            address = f"through {short_peer(peer.relayed_by)}"
        table.add_row(short_peer(peer.peer_id), peer.path, escape(address), rtt, duration(peer.connected_s), common)
    return table


def ping(result: PingResult) -> str:
    """One answer."""
    took = f"{result.rtt_ms:.1f} ms ({result.path}; {result.first_byte_s:.3f} s in all)"
    return f"{short_peer(result.peer)} answered in {took}: {escape(result.address)}"


def nat(info: NatInfo) -> RenderableType:
    """How this node is reached, and how it knows."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column()
    facts.add_column(overflow="fold")
    facts.add_row("reachability", f"[bold]{info.reachability}[/]")
    facts.add_row("NAT (UDP)", info.udp)
    for family in info.families:
        if family.evidence:
            ports = "" if family.tcp_mapping == "unknown" else f", TCP ports: {family.tcp_mapping}"
            facts.add_row(family.family, f"{family.reachability}, UDP: {family.udp}{ports}")
    facts.add_row("port mapping", escape(info.port_mapping or "none"))
    if not info.port_mapping and info.port_mapping_attempts:
        facts.add_row("", Text("\n".join(info.port_mapping_attempts), style="dim"))
    held = ", ".join(short_peer(relay) for relay in info.held_relays)
    facts.add_row("reached through", held or "no relay")
    if info.relaying:
        passed = (
            f"{info.num_reservations} nodes, {info.num_circuits} circuits, {info.relayed_bytes / 1e6:,.1f} MB so far"
        )
        facts.add_row("relays for", passed)
    facts.add_row("addresses", escape("\n".join(info.addresses) or "none"))
    evidence = [f"{family.family}: {line}" for family in info.families for line in family.evidence]
    parts: list[RenderableType] = [facts]
    if evidence:
        parts += ["", Text("how it is known", style="bold"), *(Text(f"  {line}") for line in evidence)]
    return Group(*parts)


def doctor(info: DoctorInfo) -> RenderableType:
    """What is in the way, and what can be done."""
    marks = {"problem": ("✗", "bold red"), "note": ("!", "yellow"), "good": ("✓", "green")}
    table = Table.grid(padding=(0, 1))
    table.add_column()
    table.add_column(overflow="fold")
    for finding in info.findings:
        mark, style = marks[finding.level]
        table.add_row(Text(mark, style=style), Text(finding.what))
        if finding.advice:
            table.add_row("", Text(f"→ {finding.advice}", style="dim"))
    parts: list[RenderableType] = [table]
    if info.peers:
        rungs = _table("peer", "path", "NAT of the peer", "what was tried")
        for peer in info.peers:
            tried = [f"{each.rung}: {each.failure or 'worked'}" for each in peer.tried]
            rungs.add_row(short_peer(peer.peer_id), peer.path, peer.nat, Text("\n".join(tried)))
        parts += ["", rungs]
    return Group(*parts)


def swarms(found: Sequence[SwarmSummary]) -> RenderableType:
    """The runs that the node is in."""
    if not found:
        return "no swarms: start one with `shoal swarm create`, or `shoal join TICKET`"
    table = _table("swarm", "name", "task", "role", "phase", ">epoch", ">return", ">target", ">env steps", ">members")
    for each in found:
        is_alone = each.alone and each.phase not in ENDED
        table.add_row(
            short_swarm(each.swarm),
            escape(each.name or ""),
            escape(each.task.removeprefix("gym:")),
            each.role,
            Text("ALONE", style=ALONE) if is_alone else _phase(each.phase),
            str(each.epoch),
            number(each.mean_return),
            number(each.target_return),
            f"{each.env_steps:,}",
            str(each.num_members),
        )
    errors = [Text(f"{short_swarm(each.swarm)}: {each.error}", style="bold red") for each in found if each.error]
    return Group(table, *errors) if errors else table


def swarm(detail: SwarmDetail) -> RenderableType:
    """Everything about one run that fits on a screen; the live view is this, again and again."""
    facts = Table.grid(padding=(0, 2))
    is_endless = detail.max_env_steps >= ENDLESS_STEPS
    facts.add_row("phase", _phase(detail.phase), "epoch", f"[bold]{detail.epoch}[/]")
    facts.add_row(
        "return",
        f"[bold]{number(detail.mean_return)}[/] of {number(detail.target_return)}",
        "training return",
        number(detail.training_return),
    )
    facts.add_row(
        *("env steps", f"{detail.env_steps:,}" + ("" if is_endless else f" of {detail.max_env_steps:,}")),
        *("steps/s", f"{detail.steps_per_s:,.0f}"),
    )
    num_live = sum(member.live for member in detail.members)
    facts.add_row("members", f"{num_live} live of {len(detail.members)}", "elapsed", duration(detail.elapsed_s))
    if detail.env_arguments:
        from shoal.training.env_arguments import in_words  # Seldom shown, and the training room's first file costs.

        facts.add_row("made with", escape(in_words(detail.env_arguments)))
    parts: list[RenderableType] = [facts]
    if detail.loop_socket is not None and detail.phase == "starting":
        parts.append(Text("no training loop is attached at this node; docs/averager.md says how yours is", style="dim"))
    if detail.phase == "done" and detail.trained_alone:
        parts.append(alone_line("nobody but this node put anything into this run"))
    elif detail.alone and detail.phase not in ENDED:
        parts.append(alone_line("this node trains by itself; nobody else is in the swarm now"))
    if detail.curve:
        parts += ["", curve(detail.curve, detail.target_return)]
    if detail.members:
        parts += ["", _members(detail.members, detail.batch_per_learner), *_waiting(detail.members)]
    if detail.error:
        parts.append(Text(detail.error, style="bold red"))
    if detail.digest:
        parts.append(Text(f"parameters {detail.digest[:16]}…", style="dim"))
    title = f"{escape(detail.name or detail.task)} · {escape(detail.algorithm)} · {short_swarm(detail.swarm)}"
    return Panel(Group(*parts), title=title, title_align="left", expand=False)


def live(details: Iterable[SwarmDetail], console: Console) -> SwarmDetail:
    """Show a run until it has ended; gives the last of it.

    Elsewhere than on a terminal it prints one plain line per epoch instead.
    """
    shown: tuple[object, ...] = ()
    with Live(console=console, auto_refresh=False) if console.is_terminal else _Nothing() as view:
        for detail in details:
            if view is not None:
                view.update(swarm(detail), refresh=True)
            elif (news := (detail.epoch, detail.alone, detail.phase in ENDED, detail.error)) != shown:
                shown = news
                console.print(plain_line(detail), soft_wrap=True, markup=False)
            if detail.phase in ENDED:
                return detail
    raise AssertionError("watching ends with the run or with an error")


def plain_line(detail: SwarmDetail) -> str:
    """A run on one line, for logs."""
    alone = "  ALONE: nobody else is in the swarm" if detail.alone and detail.phase not in ENDED else ""
    error = f"  {' '.join(detail.error.split())}" if detail.error else ""
    waits = f"  waits {detail.waits}" if detail.waits and detail.role != "learner" else ""
    return (
        f"{duration(detail.elapsed_s):>8}  epoch {detail.epoch:<4} {detail.phase:<10}  "
        f"return {number(detail.mean_return)} of {number(detail.target_return)}  {detail.env_steps:,} steps  "
        f"{detail.steps_per_s:,.0f} steps/s  {sum(member.live for member in detail.members)} live{alone}{waits}{error}"
    )


def alone_line(text: str) -> RenderableType:
    """That nobody else is there, so that nobody can miss it."""
    return Text(f" ALONE: {text} ", style=ALONE)


def curve(points: Sequence[CurvePoint], target: float | None) -> Text:
    """The returns of the evaluations over environment steps, in block characters."""
    low = min(0.0, *(point.mean_return for point in points))
    high = max(low + 1e-9, target if target is not None else low, *(point.mean_return for point in points))
    last_step = max(1, points[-1].env_steps)
    heights: list[float] = []
    for column in range(_CURVE_WIDTH):
        steps = (column + 1) / _CURVE_WIDTH * last_step
        value = next((point.mean_return for point in reversed(points) if point.env_steps <= steps), None)
        heights.append(0.0 if value is None else (value - low) / (high - low) * _CURVE_ROWS)
    text = Text()
    for row in reversed(range(_CURVE_ROWS)):
        label = number(high) if row == _CURVE_ROWS - 1 else number(low) if row == 0 else ""
        cells = "".join(_BLOCKS[round(min(1.0, max(0.0, height - row)) * 8)] for height in heights)
        text.append(f"{label:>7} ", style="dim").append(cells, style="cyan").append("\n" if row else "")
    return text


def number(value: float | None) -> str:
    """A return, or a dash."""
    return "-" if value is None else f"{value:,.1f}"


def duration(seconds: float) -> str:
    """Like ``1h02m``, ``3m07s``, ``12s``."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


class _Nothing:
    """Stands in for the live view where there is no terminal."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


def _members(members: Sequence[MemberInfo], batch_per_learner: int) -> Table:
    has_shards = any(member.shards_made for member in members)
    shards = (">shards used", ">of learned", ">checked", ">refused", ">age") if has_shards else ()
    table = _table("member", "phase", ">epoch", "this epoch", ">steps/s", "contributed", ">env steps", *shards)
    for member in sorted(members, key=lambda member: (not member.live, -member.env_steps, member.peer_id)):
        name = short_peer(member.peer_id) + (" you" if member.is_self else "")
        phase = _phase(member.role if member.role != "learner" else member.phase)
        table.add_row(
            name,
            phase if member.live else Text("gone", style="red"),
            str(member.epoch) if member.live else "",
            _bar(member.samples / max(1, batch_per_learner), "green", _BAR_WIDTH) if member.live else "",
            f"{member.steps_per_s:,.0f}" if member.live else "",
            _bar(member.share, "cyan", _BAR_WIDTH).append(f" {member.share:4.0%}", style="default"),
            f"{member.env_steps:,}",
            *(_shards(member) if has_shards else ()),
            style="" if member.live else "dim",
        )
    return table


def _waiting(members: Sequence[MemberInfo]) -> list[Text]:
    """What members wait for, in words; a learner that waits for others in a round does so all the time."""
    waiting: dict[str, list[str]] = {}
    for member in members:
        if member.live and member.waits and member.role != "learner":
            waiting.setdefault(member.waits, []).append(short_peer(member.peer_id))
    return [Text(f"{', '.join(names)}: waits {words}", style="yellow") for words, names in waiting.items()]


def _shards(member: MemberInfo) -> tuple[str, ...]:
    """Of a member's shards, here: those learned from, their part of all, those replayed, those refused, their age."""
    if not member.shards_made:
        return "", "", "", "", ""
    used = f"{member.shards_used} of {member.shards_made}"
    checked, refused = str(member.shards_checked), str(member.shards_refused)
    return used, f"{member.shards_share:.0%}", checked, refused, f"{member.mean_staleness:.1f}"


def _bar(share: float, style: str, width: int) -> Text:
    full = min(1.0, max(0.0, share)) * width
    whole = int(full)
    rest = _EIGHTHS[int((full - whole) * 8)]
    return Text(("█" * whole + rest).ljust(width)[:width], style=style)


def _phase(phase: str) -> Text:
    styles = {"done": "bold green", "failed": "bold red", "waiting": "yellow", "left": "dim"}
    return Text(phase, style=styles.get(phase, ""))


def _table(*columns: str) -> Table:
    """A plain table; a column whose title begins with ``>`` is aligned to the right."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    for column in columns:
        table.add_column(
            column.removeprefix(">"), justify="right" if column.startswith(">") else "left", overflow="fold"
        )
    return table
