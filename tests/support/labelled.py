"""A clean set whose images have classes: the layout of clip_benchmark's WebDatasets."""

from pathlib import Path

from tests.support.tars import write_tar


def write_labelled(folder: Path, members: list[tuple[str, bytes]]) -> dict[str, str]:
    """Write the pairs of a tar with a class for each caption; returns the settings of a zero-shot target.

    Args:
        folder: gets labelled/00000.tar, classes.txt and templates.txt.
        members: of a tar of pairs.
    """
    classes = sorted({data.decode() for name, data in members if name.endswith(".txt")})
    labelled = []
    for name, data in members:
        if name.endswith(".txt"):
            labelled.append((name.removesuffix(".txt") + ".cls", str(classes.index(data.decode())).encode()))
        elif not name.endswith(".json"):
            labelled.append((name, data))
    write_tar(folder / "labelled" / "00000.tar", labelled)
    (folder / "classes.txt").write_text("\n".join(classes))
    (folder / "templates.txt").write_text("an emoji of a {c}\n{}\n")
    texts = {name: str(folder / f"{name}.txt") for name in ("classes", "templates")}
    return {"shards": str(folder / "labelled"), "loss": "zero_shot", **texts}
