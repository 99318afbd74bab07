"""What a run prints while it trains; light, so that training begins without the report's needs."""

from reporting.run_folder import unit_of


def show(figure: dict | float | None, digits: int = 4) -> str:
    """A number; {"value", "low", "high"} as `0.9938 (0.9778–0.9983)`, {"mean", "sd", "n"} as
    `0.9815 ± 0.0031`; None as a dash."""
    if not isinstance(figure, dict):
        return "–" if figure is None else f"{figure:.{digits}f}"
    if figure.get("value", figure.get("mean")) is None:
        return "–"
    if "mean" in figure:
        return show(figure["mean"]) + ("" if figure["sd"] is None else f" ± {show(figure['sd'])}")
    if figure["low"] is None:
        return f"{show(figure['value'])} (no interval)"
    return f"{show(figure['value'])} ({show(figure['low'])}–{show(figure['high'])})"


def print_table(header: list[str], rows: list[list]) -> None:
    """Aligned columns on stdout."""
    widths = [max(len(str(row[i])) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        print("  ".join(str(x).ljust(w) for x, w in zip(row, widths, strict=True)).rstrip())


def print_epoch(record: dict, total: int) -> None:
    """The line of an epoch, or of a round; null figures are dashes."""
    unit = unit_of(record)
    print(f"{unit} {record[unit]}/{total}: train loss {show(record['train_loss'])}, val loss "
          f"{show(record['val_loss'])}, val accuracy {show(record['val_accuracy'])}, lr "
          f"{record['lr']:g}, {record['images_per_second']:.1f} images/s", flush=True)


def print_round(record: dict, rounds: int, names: list[str]) -> None:
    """A line for each client of the round, then one for the round. names: of all clients."""
    for c in record["clients"]:
        norm = "not finite, left out" if c["left_out"] else show(c["update_norm"], 3)
        name = c.get("site", names[c["client"]])
        print(f"  {name}: {c['num_examples']} images, "
              f"{c['steps']} steps, loss {show(c['loss'])}, accuracy {show(c['accuracy'], 3)}, "
              f"update norm {norm}, skipped {show(c['skipped_steps'], 0)}")
    print_epoch(record, rounds)
