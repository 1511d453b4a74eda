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


def models(found: Sequence[ModelInfo]) -> RenderableType:
    """A row for each."""
    if not found:
        return "no models; `shoal model publish FOLDER --name NAME` makes one, `shoal model get CID` fetches one"
    table = Table(box=None, header_style="bold")
    for column in ("name", "size", "files", "tags", "", "CID"):
        table.add_column(column, overflow="fold")
    for info in found:
        state = "pinned" if info.is_pinned else "" if info.is_whole else "in part"
        tags = escape(" ".join(info.tags))
        table.add_row(escape(info.name) or "-", size(info.num_bytes), str(info.num_files), tags, state, info.cid)
    return table


def model(detail: ModelDetail) -> RenderableType:
    """One, with its files."""
    table = Table.grid(padding=(0, 2))
    for file in detail.files:
        table.add_row(size(file.num_bytes), escape(file.path))
    more = detail.num_files - len(detail.files)
    return Group(models([detail]), "", table, *([f"and {more} more"] if more > 0 else []))


def fetching(info: FetchInfo) -> str:
    """One line of progress."""
    of = f" of {size(info.of_bytes)}" if info.of_bytes else ""
    return f"{size(info.num_bytes)}{of}, {info.mb_per_s:g} MB/s from {len(info.sources)} peers"


def fetched(info: FetchInfo, out: Path | None) -> RenderableType:
    """How a fetch went."""
    where = "it is kept on this node" if out is None else f"it is in {out}"
    lines = [f"{size(info.num_bytes)} came in {info.seconds:.1f} s ({info.mb_per_s:g} MB/s); {where}"]
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
