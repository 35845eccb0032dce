"""Split of the photographs into training, validation and test.

Whole photographs are held out, not crops of them. Each photograph has a name that is the same in every copy: the folder
of a Plasma wallpaper, or the file's stem for MATE's and Lomiri's backgrounds. Abstract art, renderings and paintings in
these collections are in none of the three splits. scikit-image's test images are never used for training either.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["HELD_OUT", "TRAINING", "VALIDATION", "photo_name", "split_of"]

#: test photographs: boats under an evening sky, planks and water, grass by the sea, a ladybird, drops on leaves
HELD_OUT = ("BytheWater", "Dune", "EveningGlow", "LadyBird", "RainDrops")
#: for choosing settings: a jetty in fog (grey), a flower, grass, a road under a storm
VALIDATION = ("ColdRipple", "Garden", "GreenMeadow", "Storm")
#: all other photographs of the collections, including Lomiri's (Ubuntu Touch 16.04)
TRAINING = ("Bridge_by_Sander_Klootwijk", "Dragonfly_by_Bolly", "Kleiber_by_Lukas_Baubkus", "Picture_0B_by_freespace",
            "Picture_1A_by_freespace", "Wine_by_Jakkub_Mede", "aitzgorri_by_Aitzol_Berasategi", "free_by_Peter_Nerlich",
            "friends_by_Aitzol_Berasategi", "greentock_by_Peter_Nerlich", "life_by_Aitzol_Berasategi",
            "picosdeeuropa_by_Aitzol_Berasategi", "seeding_by_Clements_Engelhardt", "sunset_by_Aitzol_Berasategi",
            "Aqua", "Blinds", "ColorfulCups", "DarkestHour", "FallenLeaf", "FreshFlower", "Grey", "Kite",
            "OneStandsOut", "Path", "TwoWings", "Wood", "YellowFlower", "summer_1am")


def photo_name(path: str | Path) -> str:
    """Name of a photograph in this split.

    Args:
        path: Path of a file, such as ``wallpapers/Kite/contents/images/2560x1600.jpg`` or ``mate/nature/Dune.jpg``.

    Returns:
        The wallpaper's folder for a file under ``contents``, else the file's stem.

    Example:
        >>> photo_name("wallpapers/Kite/contents/images/2560x1600.jpg"), photo_name("nature/Dune.jpg")
        ('Kite', 'Dune')
    """
    path = Path(path)
    parts = path.parts
    if "contents" in parts and parts.index("contents") > 0:
        return parts[parts.index("contents") - 1]
    return path.stem


def split_of(path: str | Path) -> str | None:
    """Split of a photograph.

    Args:
        path: Path, as in :func:`photo_name`.

    Returns:
        ``"test"``, ``"validation"`` or ``"training"``; None for an image in none of them.

    Example:
        >>> split_of("nature/Dune.jpg"), split_of("abstract/Flow.png")
        ('test', None)
    """
    name = photo_name(path)
    for split, names in (("test", HELD_OUT), ("validation", VALIDATION), ("training", TRAINING)):
        if name in names:
            return split
    return None
