"""Models as people see them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from shoal.cli.render import short_peer
from shoal.node.api.schemas import ContentInfo, FetchInfo, ModelDetail, ModelInfo


def size(num_bytes: int) -> str:
    """Bytes, with a decimal unit."""
    number = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def published(info: ModelInfo) -> RenderableType:
    """What was published, and how others get it."""
    told = (
        f"{info.num_told} other nodes keep its name"
        if info.num_told
        else "nobody else knows of it yet: others find it once this node is connected to somebody"
    )
    return (
        f"{info.name}, version {info.version}: {size(info.num_bytes)} in {info.num_files} files, on this node; {told}\n"
        f"on another node: shoal model get {info.owner}/{info.name} -o FOLDER"
    )


def models(found: Sequence[ModelInfo]) -> RenderableType:
    """A row for each that is here."""
    if not found:
        return "no models; `shoal model publish FOLDER --name NAME` makes one, `shoal model get MODEL` fetches one"
    table = Table(box=None, header_style="bold")
    for column in ("name", "version", "owner", "size", "files", "tags", "", "CID"):
        table.add_column(column, overflow="fold")
    for info in found:
        state = "pinned" if info.is_pinned else "" if info.is_whole else "in part" if info.num_files else "not here"
        table.add_row(
            escape(info.name) or "-",
            str(info.version or "-"),
            short_peer(info.owner) if info.owner else "-",
            size(info.num_bytes),
            str(info.num_files),
            escape(" ".join(info.tags)),
            state,
            info.cid,
        )
    return table


def found(word: str, infos: Sequence[ModelInfo]) -> RenderableType:
    """A row for each of any node."""
    if not infos:
        return escape(f"nobody who can be reached has a model with the tag or the name {word!r}")
    table = Table(box=None, header_style="bold")
    for column in ("model", "version", "size", "tags"):
        table.add_column(column, overflow="fold")
    for info in infos:
        tags = escape(" ".join(info.tags))
        table.add_row(escape(f"{info.owner}/{info.name}"), str(info.version), size(info.num_bytes), tags)
    return table


def model(detail: ModelDetail) -> RenderableType:
    """One, with its files and versions, and who has it."""
    lines: list[RenderableType] = [models([detail]), ""]
    if detail.files:
        table = Table.grid(padding=(0, 2))
        for file in detail.files:
            table.add_row(size(file.num_bytes), escape(file.path))
        more = detail.num_files - len(detail.files)
        lines += [table, *([f"and {more} more"] if more > 0 else []), ""]
    lines += [f"version {each.version}: {each.cid}" for each in detail.versions]
    lines += [f"DISPUTED: its owner also signed {each.cid} as version {each.version}" for each in detail.disputed]
    lines.append(f"had by {', '.join(map(short_peer, detail.stored_on)) or 'nobody who can be found'}")
    return Group(*lines)


def fetching(info: FetchInfo) -> str:
    """One line of progress."""
    of = f" of {size(info.of_bytes)}" if info.of_bytes else ""
    return f"{size(info.num_bytes)}{of}, {info.mb_per_s:g} MB/s from {len(info.sources)} peers"


def fetched(info: FetchInfo, out: Path | None) -> RenderableType:
    """How a fetch went."""
    where = "it is kept on this node" if out is None else f"it is in {out}"
    what = f"{info.model}: " if info.model else ""
    lines = [f"{what}{size(info.num_bytes)} came in {info.seconds:.1f} s ({info.mb_per_s:g} MB/s); {where}"]
    for peer, num_bytes in sorted(info.sources.items(), key=lambda item: -item[1]):
        lines.append(f"  {size(num_bytes)} from {short_peer(peer)}")
    return escape("\n".join(lines))


def content(info: ContentInfo) -> RenderableType:
    """What is on disk, and what is on its way."""
    table = Table.grid(padding=(0, 2))
    table.add_row("models", size(info.model_bytes))
    table.add_row("blocks of runs", size(info.run_bytes))
    table.add_row("everything", f"{size(info.disk_bytes)} of {size(info.max_disk_bytes)}")
    if info.num_damaged:
        table.add_row("damaged blocks found", str(info.num_damaged))
    for each in info.fetching:
        table.add_row("on its way", f"{each.cid}: {fetching(each)}")
    return table


def bench_blocks(figures: dict[str, float]) -> RenderableType:
    """What `shoal bench blocks` measured."""
    return (
        f"{figures['seconds']:.2f} s until {figures['receivers']} had it: {figures['mb_per_s']:,.0f} MB/s each, "
        f"{figures['memory_mb']:.0f} MB more memory in the node that took most"
    )
