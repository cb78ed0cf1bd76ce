"""The feature caches of a storage_path, for people: what `python -m jobs.features` prints and does. No cluster."""

from collections.abc import Collection
from pathlib import Path

from minivlm import layout
from minivlm.config import Config
from minivlm.data import cache_tools
from minivlm.data.errors import DataError
from minivlm.data.pipeline import open_features
from minivlm.data.samples import load_pictures
from minivlm.data.shards import Shard


def stat_lines(config: Config) -> list[str]:
    """One line per tower, then every torn file with its reason.

    Raises:
        DataError: no features yet.
    """
    reports = [cache_tools.report(directory) for directory in _caches(config)]
    lines = [f"{'tower':<18}{'pictures':>10}{'encoded':>10}{'duplicates':>12}{'shards':>8}{'MiB':>10}{'torn':>6}"]
    lines += [_stat_line(found) for found in reports]
    for found in reports:
        lines += [f"torn: {path}: {reason}" for path, reason in found.torn.items()]
        if found.unverifiable:
            lines.append(f"{found.directory.name}: {found.unverifiable} shards of an older version have no checksum")
    return lines


def verify_lines(config: Config, *, drop: bool) -> list[str]:
    """Compare all checksums; with `drop`, damaged shards go, so that their pictures are encoded again.

    Raises:
        DataError: no features yet, or damage that is not dropped.
    """
    lines: list[str] = []
    damaged: list[Shard] = []
    for directory in _caches(config):
        found = cache_tools.verify(directory)
        damaged += found.damaged
        old = f", {found.unverifiable} without a checksum (an older version wrote them)" if found.unverifiable else ""
        lines.append(f"{directory.name}: {found.checked} shards compared, {len(found.damaged)} damaged{old}")
    lines += [f"damaged: {shard.data} ({len(shard.digests)} pictures)" for shard in damaged]
    if damaged and not drop:
        lines.append("These bits are not those that were written. Type: python -m jobs.features verify --drop")
        raise DataError("\n".join(lines))
    for shard in damaged:
        cache_tools.drop(shard)
    if damaged:
        lines.append("dropped; their pictures are encoded again when they are needed: python -m jobs.prepare")
    return lines


def prune_lines(config: Config, *, unused: bool, other_towers: bool, older_than_h: float, yes: bool) -> list[str]:
    """What a prune frees, and with `yes` the prune itself.

    Args:
        unused: also pictures that no prepared rows under storage_path name.
        other_towers: also the caches of all towers but the config's.
        older_than_h: age in hours from which torn files and temporaries go.

    Raises:
        DataError: no features yet.
    """
    directories = _caches(config)
    others: list[Path] = []
    if other_towers:
        own = open_features(config, layout.tower_path(config)).directory
        others = [directory for directory in directories if directory != own]
    used = _used_pictures(config) if unused else None
    plans = [
        cache_tools.plan_prune(directory, used=used, min_age_s=older_than_h * 3600)
        for directory in directories
        if directory not in others
    ]
    lines = [
        f"{plan.directory.name}: {len(plan.leftovers)} leftovers, {plan.dropped_rows} rows, {_mib(plan.freed)}"
        for plan in plans
    ]
    lines += [f"{directory.name}: another tower, {_mib(cache_tools.folder_bytes(directory))}" for directory in others]
    freed = sum(plan.freed for plan in plans) + sum(cache_tools.folder_bytes(directory) for directory in others)
    if not yes:
        return [*lines, f"would free {_mib(freed)}; nothing was removed. Add --yes to remove it"]
    damaged = [rewrite for plan in plans for rewrite in cache_tools.prune(plan)]
    for directory in others:
        cache_tools.remove_cache(directory)
    for rewrite in damaged:
        lines.append(f"left alone, damaged: {rewrite.shard.data}. Type: python -m jobs.features verify --drop")
    return [*lines, f"freed {_mib(freed - sum(rewrite.freed for rewrite in damaged))}"]


def _stat_line(found: cache_tools.CacheReport) -> str:
    counts = f"{found.pictures:>10}{found.rows:>10}{found.duplicates:>12}{found.shards:>8}"
    return f"{found.directory.name:<18}{counts}{found.num_bytes / 2**20:>10.1f}{len(found.torn):>6}"


def _caches(config: Config) -> list[Path]:
    root = layout.features_root(config)
    found = cache_tools.caches(root)
    if not found:
        raise DataError(f"No image features under {root}. Run: python -m jobs.prepare")
    return found


def _used_pictures(config: Config) -> Collection[str]:
    """Pictures of all prepared rows, whatever settings prepared them."""
    datasets = layout.samples_dir(config).parent
    summaries = list(datasets.glob("samples-*/summary.json"))
    if not summaries:
        raise DataError(f"No prepared rows under {datasets}, so every picture would be unused. Leave out --unused")
    return {digest for summary in summaries for digest in load_pictures(summary.parent)}


def _mib(num_bytes: int) -> str:
    return f"{num_bytes:,} bytes ({num_bytes / 2**20:.1f} MiB)"
