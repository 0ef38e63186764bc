"""One colour per recipe, the same in every chart and table.

The eight hues were searched for the largest smallest distance (OKLab) under normal vision, protanopia,
deuteranopia and tritanopia, once on a light and once on a dark ground, hue by hue alike. The ninth recipe
gets the first hue, dashed.
"""

from typing import Any

from heterodox.report.study import Study

LIGHT = ("#244c99", "#a4830a", "#157558", "#bc548f", "#37a4c7", "#901302", "#6668cc", "#6a2b6b")
DARK = ("#1187db", "#dcd64d", "#67bd85", "#fd9fbe", "#4ef1fb", "#d27245", "#a99ef1", "#9d6f9e")
DASHES = ([1, 0], [7, 3], [2, 2])
BASELINE = ("#16181d", "#f2f3f5")
HEAD_ONLY = ("#83878f", "#8b9099")


def styles(study: Study) -> list[dict[str, Any]]:
    """Colours and dashes of the recipes, in order; the two that span the gap are black and grey."""
    found = []
    hue = 0
    for recipe in study.recipes:
        if recipe == study.baseline:
            colours, dash = BASELINE, DASHES[0]
        elif study.of(recipe)[0].summary.get("credit") == "head_only":
            colours, dash = HEAD_ONLY, DASHES[0]
        else:
            colours, dash = (LIGHT[hue % 8], DARK[hue % 8]), DASHES[hue // 8 % len(DASHES)]
            hue += 1
        found.append({"recipe": recipe, "light": colours[0], "dark": colours[1], "dash": dash})
    return found
