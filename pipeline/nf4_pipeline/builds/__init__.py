"""Builds side by side: which one a name means, which folder a recipe gets, and what keeps it.

    find_build("sample")          a model, a tag, a folder's name, or a path -> its build
    find_artifact("calibrated")   the same -> its artifact; a downloaded artifact, too
    list_builds()                 all of them, the one worked on last first

listing.py   what is known of each build without reading its weights
choosing.py  a name -> one of a listing; what is ambiguous is refused
finding.py   a name -> a build or an artifact on the disk
placing.py   a source and a recipe -> a folder of their own, begun with what is done beside it
keeping.py   what a build folder is for, noted before any work; it becomes nothing else unasked
"""

from nf4_pipeline.builds.choosing import Chosen
from nf4_pipeline.builds.finding import ChosenArtifact, find_artifact, find_build, find_other
from nf4_pipeline.builds.keeping import check_spec, keep_spec, spec_of
from nf4_pipeline.builds.listing import Listed, list_builds
from nf4_pipeline.builds.placing import begin_beside, folder_for, place_of

__all__ = [
    "Chosen",
    "ChosenArtifact",
    "Listed",
    "begin_beside",
    "check_spec",
    "find_artifact",
    "find_build",
    "find_other",
    "folder_for",
    "keep_spec",
    "list_builds",
    "place_of",
    "spec_of",
]
