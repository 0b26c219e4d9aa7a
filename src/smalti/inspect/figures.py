"""The pictures of the findings: matplotlib figures without a display, and their PNG bytes.

Letters: L positions, h w grid, K codes, T tokens.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Integer, Shaped
from matplotlib.figure import Figure

from smalti.inspect.attention import Head
from smalti.inspect.causes import AblationLosses
from smalti.inspect.grid import Grid

_MAP = "viridis"
_SIGNED = "RdBu_r"
_CLUSTERS = "tab20"
_BLUE = "#33658a"


def png_bytes(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90, pil_kwargs={"compress_level": 3})
    return buffer.getvalue()


def _figure(
    width: float, height: float, rows: int = 1, columns: int = 1, *, left: float = 0.65, bottom: float = 0.55
) -> tuple[Figure, Any]:
    """Axes with room in inches for what stands around them. A layout solver would measure every label twice over, which
    takes longer than all the drawing."""
    figure = Figure(figsize=(width, height))
    axes = figure.subplots(rows, columns, squeeze=False)
    wide, high = (width - left - 0.2) / columns, (height - bottom - 0.35) / rows
    figure.subplots_adjust(
        left=left / width, right=1 - 0.2 / width, bottom=bottom / height, top=1 - 0.35 / height,
        wspace=(left + 0.1) / max(wide - left, 0.5), hspace=(bottom + 0.3) / max(high - bottom, 0.5),
    )  # fmt: skip
    return figure, axes


def _heat(axes: Any, values: Shaped[np.ndarray, "h w"], title: str, *, numbers: bool = True, **given: Any) -> Any:
    image = axes.imshow(values, **{"cmap": _MAP, "aspect": "auto", **given})
    axes.set_title(title, fontsize=10)
    if numbers and values.size <= 120:
        low, high = image.get_clim()
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                dark = (value - low) < 0.55 * max(high - low, 1e-12)
                colour = "white" if dark and image.get_cmap().name == _MAP else "black"
                axes.text(column, row, _short(float(value)), ha="center", va="center", fontsize=7, color=colour)
    return image


def _short(value: float) -> str:
    """At most about four characters: 0.03, 2.3, 441."""
    if abs(value) >= 100:
        return f"{value:.0f}"
    return "0" if abs(value) < 0.005 else f"{value:.2f}" if abs(value) < 1 else f"{value:.2g}"


def _by_position(axes: Any, values: Float[np.ndarray, " L"], grid: Grid | None, title: str, **given: Any) -> None:
    """A map of the grid's cells, or bars along the line where there is no grid."""
    if grid is not None:
        image = _heat(axes, values[grid.positions], title, aspect="equal", **given)
        axes.figure.colorbar(image, ax=axes, shrink=0.8)
        axes.set_xlabel("column")
        axes.set_ylabel("row")
        return
    axes.bar(np.arange(len(values)), values, color=_BLUE, width=1.0)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("position in the line")


def position_maps(named: Mapping[str, Float[np.ndarray, " L"]], grid: Grid | None) -> Figure:
    """One map for each named quantity of the positions."""
    figure, axes = _figure(4.2 * len(named), 3.6, 1, len(named))
    for place, (title, values) in zip(axes[0], named.items(), strict=True):
        _by_position(place, values, grid, title)
    return figure


def information_map(information: Float[np.ndarray, "L L"], grid: Grid | None) -> Figure:
    """The mutual information of all pairs of positions; with a grid also by rows and columns apart."""
    figure, axes = _figure(10.0 if grid else 5.5, 4.4, 1, 2 if grid else 1)
    top = np.quantile(information, 0.99)
    image = _heat(axes[0, 0], information, "mutual information of two positions, nats", numbers=False, vmin=0, vmax=top)
    axes[0, 0].set(xlabel="position", ylabel="position", aspect="equal")
    figure.colorbar(image, ax=axes[0, 0], shrink=0.8)
    if grid:
        means = _information_by_distance(information, grid)
        _heat(axes[0, 1], means, "the same by distance in the grid found, nats", vmin=0)
        axes[0, 1].set(xlabel="columns apart", ylabel="rows apart")
    return figure


def reading_map(grid: Grid) -> Figure:
    """The position of the line in each cell, and the way from one to the next."""
    figure, axes = _figure(0.5 * grid.columns + 1.6, 0.5 * grid.rows + 1.0)
    _heat(axes[0, 0], grid.positions, "position in the line", numbers=False, aspect="equal", cmap="Blues")
    inside = grid.cells[[position for position in range(grid.length) if position not in grid.outside]]
    axes[0, 0].plot(inside[:, 1], inside[:, 0], color=_BLUE, linewidth=0.8, alpha=0.6)
    if grid.positions.size <= 400:
        for (row, column), position in np.ndenumerate(grid.positions):
            colour = "white" if position > 0.6 * grid.length else "black"
            axes[0, 0].text(column, row, str(position), ha="center", va="center", fontsize=7, color=colour)
    axes[0, 0].set(xticks=[], yticks=[])
    return figure


def _information_by_distance(information: Float[np.ndarray, "L L"], grid: Grid) -> Float[np.ndarray, "down right"]:
    row, column = np.mgrid[: grid.rows, : grid.columns].reshape(2, -1)
    inside = information[np.ix_(grid.positions.ravel(), grid.positions.ravel())]
    down, right = np.abs(row[:, None] - row), np.abs(column[:, None] - column)
    size = (min(grid.rows, 8), min(grid.columns, 8))
    means = np.full(size, np.nan)
    for d, r in np.ndindex(size):
        if d or r:
            means[d, r] = inside[(down == d) & (right == r)].mean()
    return means


def frequencies(counts: Integer[np.ndarray, " K"], burstiness: Float[np.ndarray, " K"]) -> Figure:
    figure, axes = _figure(10, 3.4, 1, 2)
    used = np.sort(counts[counts > 0])[::-1]
    axes[0, 0].loglog(np.arange(1, len(used) + 1), used, color=_BLUE)
    axes[0, 0].set_title("how often codes occur", fontsize=10)
    axes[0, 0].set(xlabel="rank of the code", ylabel="occurrences")
    occurs = counts > 0
    axes[0, 1].scatter(counts[occurs], burstiness[occurs], s=8, color=_BLUE, alpha=0.6)
    axes[0, 1].axhline(1, color="black", linewidth=0.8)
    axes[0, 1].set_title("burstiness (1: chance)", fontsize=10)
    axes[0, 1].set(xlabel="occurrences", ylabel="over chance", xscale="log")
    for place in axes.flat:
        place.minorticks_off()  # a logarithmic axis has dozens, and each takes its time
    return figure


def place_maps(counts: Integer[np.ndarray, "K L"], codes: Sequence[int], grid: Grid | None) -> Figure:
    """Where each of the codes stands, darkest nowhere."""
    columns = min(8, len(codes))
    rows = -(-len(codes) // columns)
    maps = [counts[code][grid.positions] if grid else counts[code][None] for code in codes]
    figure = Figure(figsize=(1.35 * columns, 1.55 * rows))
    _mosaic(figure, [maps[start : start + columns] for start in range(0, len(maps), columns)],
            [[f"code {code}" for code in codes[start : start + columns]] for start in range(0, len(codes), columns)],
            aspect="equal" if grid else "auto")  # fmt: skip
    return figure


def _mosaic(
    figure: Figure,
    maps: Sequence[Sequence[Shaped[np.ndarray, "h w"]]],
    titles: Sequence[Sequence[str]],
    *,
    aspect: str = "equal",
    least: float | None = None,
    lines: int = 1,
) -> tuple[Any, list[tuple[float, float]]]:
    """Rows of maps, all of one shape, each from its least (or `least`) to its largest value, with its title of so many
    lines above it. They are one picture in one pair of axes: axes of their own would take longer than all else. Returns
    the axes, and where in them the middle of each map's last row is."""
    rows, columns = len(maps), len(maps[0])
    (h, w), high, wide = maps[0][0].shape, figure.get_figheight() / rows, figure.get_figwidth() / columns
    title = 0.16 * lines + 0.06  # inches
    aspect_cell = 1.0 if aspect == "equal" else (wide * 0.92 / w) / ((high - title) * 0.95 / h)
    cell = min(wide * 0.92 / w, (high - title) * 0.95 / h * aspect_cell)  # inches of a cell's width
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    axes.set(xlim=(0, figure.get_figwidth()), ylim=(figure.get_figheight(), 0))
    middles = []
    for r, row in enumerate(maps):
        for c, values in enumerate(row):
            left, top = (c + 0.5) * wide - w * cell / 2, r * high + title
            values = np.asarray(values, dtype=float)
            axes.imshow(
                values, cmap=_MAP, vmin=least, aspect="auto", interpolation="nearest",
                extent=(left, left + w * cell, top + h * cell / aspect_cell, top),
            )  # fmt: skip
            axes.text((c + 0.5) * wide, top - 0.03, titles[r][c], fontsize=8, ha="center", va="bottom")
            middles.append(((c + 0.5) * wide, top + (h - 0.5) * cell / aspect_cell))
    axes.set(xlim=(0, figure.get_figwidth()), ylim=(figure.get_figheight(), 0))
    return axes, middles


def embedding_maps(
    points: Mapping[str, Float[np.ndarray, "M 2"]],
    clusters: Integer[np.ndarray, " M"],
    codes: Sequence[int],
) -> Figure:
    """Codes in the plane, coloured by cluster; the first 25 of them (the commonest) with their number."""
    rows = -(-len(points) // 2)
    figure, axes = _figure(10.0, 4.6 * rows, rows, 2)
    for place, (title, plane) in zip(axes.flat, points.items(), strict=True):
        place.scatter(plane[:, 0], plane[:, 1], c=clusters, cmap=_CLUSTERS, s=10)
        for code, (x, y) in zip(codes[:25], plane[:25].tolist(), strict=True):
            place.annotate(str(code), (x, y), fontsize=7)
        place.set_title(title, fontsize=10)
        place.set(xticks=[], yticks=[])
    return figure


def curve(x: Sequence[float], lines: Mapping[str, Sequence[float]], *, xlabel: str, ylabel: str, title: str) -> Figure:
    figure, axes = _figure(6, 3.4)
    for label, values in lines.items():
        axes[0, 0].plot(x, values, marker="o", markersize=4, label=label)
    axes[0, 0].set(xlabel=xlabel, ylabel=ylabel, title=title)
    if len(lines) > 1:
        axes[0, 0].legend(fontsize=8)
    return figure


def head_maps(
    heads: Sequence[Head], maps: Sequence[Float[np.ndarray, "N down right"]] | Sequence[Float[np.ndarray, "N lags"]]
) -> Figure:
    """Each head's attention by where it looks, relative to the cell that is being predicted (marked ×); without a
    grid by how many tokens back. A row of maps for each layer."""
    layers, num_heads = len(maps), len(maps[0])
    width = max(2.1, 5.0 / num_heads)
    titles = [["" for _ in range(num_heads)] for _ in range(layers)]
    for head in heads:
        titles[head.layer][head.head] = f"layer {head.layer} head {head.head}\n{head.name}"
    shape = np.asarray(maps[0][0]).shape
    if len(shape) == 2:
        figure = Figure(figsize=(width * num_heads, (0.92 * width * shape[0] / shape[1] + 0.45) * layers))
        axes, middles = _mosaic(figure, [list(map(np.asarray, layer)) for layer in maps], titles, least=0.0, lines=2)
        axes.plot(*zip(*middles, strict=True), marker="x", color="white", markersize=5, linestyle="none")
        return figure
    figure, axes = _figure(width * num_heads, 1.6 * layers, layers, num_heads, left=0.35, bottom=0.5)
    for layer, head in np.ndindex(layers, num_heads):
        place, values = axes[layer, head], np.asarray(maps[layer][head])
        place.bar(np.arange(len(values)), values, color=_BLUE)
        place.tick_params(labelsize=6)
        place.set_title(titles[layer][head], fontsize=8)
    return figure


def ablation_map(losses: AblationLosses) -> Figure:
    figure, axes = _figure(9.5, 3.4, 1, 2)
    heads = losses.heads.numpy()
    limit = max(float(np.abs(heads).max()), 1e-9)
    _heat(axes[0, 0], heads, "nats per code more without a head", cmap=_SIGNED, vmin=-limit, vmax=limit)
    axes[0, 0].set(xlabel="head", ylabel="layer", xticks=range(heads.shape[1]), yticks=range(heads.shape[0]))
    layers = np.arange(len(heads))
    named = {"attention": losses.attentions, "feed-forward": losses.feed_forwards, "whole layer": losses.layers}
    for i, (label, values) in enumerate(named.items()):
        axes[0, 1].bar(layers + 0.27 * (i - 1), values.numpy(), width=0.25, label=label)
    axes[0, 1].set(xlabel="layer", ylabel="nats per code more", xticks=layers)
    axes[0, 1].set_title("nats per code more without a part of a layer", fontsize=10)
    axes[0, 1].legend(fontsize=8)
    return figure


def layer_map(values: Float[np.ndarray, "layers T"], *, title: str, label: str, xlabel: str) -> Figure:
    figure, axes = _figure(9.5, 0.42 * len(values) + 1.4)
    image = _heat(axes[0, 0], values, title, numbers=False)
    axes[0, 0].set(xlabel=xlabel, ylabel="layers done", yticks=range(len(values)))
    figure.colorbar(image, ax=axes[0, 0], label=label)
    return figure


def offset_map(values: Float[np.ndarray, "down right"], *, title: str, label: str) -> Figure:
    """Influence by place relative to the changed code (marked ×), which is in the first row's middle."""
    figure, axes = _figure(0.75 * values.shape[1] + 1.5, 0.6 * values.shape[0] + 1.2)
    middle = values.shape[1] // 2
    image = _heat(axes[0, 0], values, title)
    axes[0, 0].plot(middle, 0, marker="x", color="red", markersize=9)
    axes[0, 0].set(xlabel="columns to the right", ylabel="rows below", xticks=range(values.shape[1]))
    axes[0, 0].set_xticklabels(range(-middle, values.shape[1] - middle))
    axes[0, 0].set_yticks(range(len(values)))
    figure.colorbar(image, ax=axes[0, 0], label=label)
    return figure


def picture_grid(
    pictures: Sequence[Sequence[Float[np.ndarray, "C H W"]]],
    titles: Sequence[str] | Sequence[Sequence[str]],
    *,
    cell: float = 1.1,
) -> Figure:
    """Rows of pictures in [0, 1]; titles over the first row, or over every picture."""
    rows, columns = len(pictures), len(pictures[0])
    high, title = cell + 0.18, 0.16
    figure = Figure(figsize=(cell * columns, high * rows))
    axes = figure.add_axes((0, 0, 1, 1))  # one pair for all pictures: many would take longer than all else
    over_each = not isinstance(titles[0], str)
    for r, row in enumerate(pictures):
        for c, values in enumerate(row):
            picture = np.broadcast_to(values, (3, *values.shape[1:])).transpose(1, 2, 0)
            side = 0.92 * cell / max(picture.shape[:2])
            wide, tall = side * picture.shape[1], side * picture.shape[0]
            left, top = (c + 0.5) * cell - wide / 2, r * high + title
            extent = (left, left + wide, top + tall, top)
            axes.imshow(picture.clip(0, 1), interpolation="nearest", aspect="auto", extent=extent)
        for c, name in enumerate(titles[r] if over_each else titles if r == 0 else ()):
            axes.text((c + 0.5) * cell, r * high + title - 0.02, str(name), fontsize=8, ha="center", va="bottom")
    axes.axis("off")
    axes.set(xlim=(0, cell * columns), ylim=(high * rows, 0))
    return figure
