"""The profile that a set of recipes needs: made, or taken from the folder where an earlier run kept it."""

from pathlib import Path

from component.channels.parts import parts_of
from component.compress.draft import Draft
from component.compress.measuring import Profiling
from component.compress.profile import Profile, make_profile
from component.compress.recipe import Recipe
from component.compress.task import Task
from component.ranks.allocation import reads_profile
from component.solve.names import AUTO
from utils.whole_files import hash_of

MOMENT_TOKENS = 65536  # a profile of more is thinned: neighbours say much the same, and it has to stay the cheaper pass


def profile_for(task: Task, recipes: list[Recipe], draft: Draft | None = None) -> Profile | None:
    """The profile that these recipes need, if they do.

    draft: of the compressed model, whose gradients then count in place of the original's.
    """
    settings, means = task.settings, task.means
    shrinkages = tuple(dict.fromkeys(recipe.output_shrinkage for recipe in recipes))
    weighs_tokens = any(recipe.token_power for recipe in recipes)
    if not reads_profile(settings.allocation) and shrinkages == (None,) and not weighs_tokens:
        return None
    windows = task.text.windows[: settings.profile_nsamples]
    narrow = settings.prune == AUTO
    profiling = Profiling(
        windows,
        means.device,
        seed=settings.seed,
        shrinkages=shrinkages,
        batch=means.batch,
        layers=draft.layers if draft else None,
        thinning=-(-windows.numel() // MOMENT_TOKENS),
        parts=[parts_of(task.model.get_submodule(layer.name), layer) for layer in task.described] if narrow else None,
    )
    decisive = {
        "model": settings.model,
        "weights": task.profiles.weights,
        "windows_sha256": hash_of(windows.tolist()),
        "seed": settings.seed,
        "output_shrinkages": shrinkages,
        "thinning": profiling.thinning,
        "draft": draft and draft.identity,
        **({"narrow": True} if narrow else {}),
    }
    identity = hash_of(decisive)
    folder = _folder(task, identity, draft)
    profile = None
    for turn in range(means.team.size):  # the first process makes it, the others read it, one after the other
        if turn == means.team.rank:
            profile = make_profile(
                folder,
                identity,
                profiling,
                model=task.model,
                described=task.described,
                source=means.source,
                shelf=means.shelf,
            )
        means.team.wait()
    return profile


def _folder(task: Task, identity: str, draft: Draft | None) -> Path:
    kept = task.profiles
    if kept.folder is None:
        return kept.parent / f"profile_{kept.name}_{identity[:8]}"
    return Path(f"{kept.folder}{draft.suffix if draft else ''}")
