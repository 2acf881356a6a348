"""Builds side by side: which one a name means, which folder a recipe gets, and what keeps it.

    find_build("sample")          a model, a tag, a folder's name, or a path -> its build
    find_artifact("calibrated")   the same -> its artifact; a downloaded artifact, too
    list_builds()                 all of them, the one worked on last first

listing.py   what is known of each build without reading its weights
choosing.py  a name -> one of a listing; what is ambiguous is refused
finding.py   a name -> a build or an artifact on the disk
absent.py    what to say of a name that no build has, and which command helps
finishing.py the command that goes on with a build, or makes one like it
placing.py   a source and a recipe -> a folder of their own, begun with what is done beside it
keeping.py   what a build folder is for, noted before any work; it becomes nothing else unasked
"""

from nf4_pipeline.builds.absent import Use, no_build, why_no_artifact
from nf4_pipeline.builds.choosing import Chosen
from nf4_pipeline.builds.finding import (
    ChosenArtifact,
    at_url,
    find_artifact,
    find_build,
    find_builds,
    find_other,
)
from nf4_pipeline.builds.finishing import how_to_build, how_to_finish, not_finished
from nf4_pipeline.builds.keeping import check_spec, complete_recipe, keep_spec, spec_of
from nf4_pipeline.builds.listing import Listed, list_builds, look_at, recipe_shown
from nf4_pipeline.builds.placing import find_place, folder_for

__all__ = [
    "Chosen",
    "ChosenArtifact",
    "Listed",
    "Use",
    "at_url",
    "check_spec",
    "complete_recipe",
    "find_artifact",
    "find_build",
    "find_builds",
    "find_other",
    "find_place",
    "folder_for",
    "how_to_build",
    "how_to_finish",
    "keep_spec",
    "list_builds",
    "look_at",
    "no_build",
    "not_finished",
    "recipe_shown",
    "spec_of",
    "why_no_artifact",
]
