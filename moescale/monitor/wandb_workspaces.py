"""`moescale dashboard`: a saved view of a project in Weights & Biases, its panels in order."""

from __future__ import annotations

from typing import Any

from moescale.config import ConfigError
from moescale.monitor.wandb import knows_key
from moescale.record.figures import of_all, pattern_of_layers

NAME = "MoEScale"
SECTIONS: dict[str, dict[str, list[str] | str]] = {  # panels by title: keys that a run writes, or a pattern of them
    "Training": {
        "loss": ["loss", "eval_loss"], "throughput": ["tokens_per_second"], "gradient norm": ["grad_norm"],
        "learning rate": ["lr"],
    },
    "Load of the experts": {
        "busiest and idlest over the mean": [of_all("max_load"), of_all("min_load")],
        "coefficient of variation": [of_all("load_cv")], "share dropped": [of_all("dropped_share")],
        "experts without a row": [of_all("dead_experts")],
        "busiest expert of each layer": pattern_of_layers("max_load"),
    },
    "Router": {
        "entropy": [of_all("entropy")], "largest probability of a token": [of_all("confidence")],
        "balance loss": ["load_balance_loss"], "z-loss": ["router_z_loss"],
        "held-out tokens that changed experts": [of_all("moved")],
        "entropy of each layer": pattern_of_layers("entropy"),
    },
}
PICTURES = {"load of each layer and expert": of_all("load_map"), "busiest expert over time": of_all("load_history")}


def make_workspace(entity: str, project: str) -> Any:
    """Make the view, a `Workspace`, without network. Raises ConfigError when wandb_workspaces is not installed."""
    try:
        import wandb_workspaces.reports.v2 as reports
        import wandb_workspaces.workspaces as workspaces
    except ImportError:
        raise ConfigError("moescale dashboard needs the package wandb-workspaces: "
                          "pip install -e '.[wandb]' in MoEScale's folder") from None
    def lines(title: str, keys: Any) -> Any:
        return reports.LinePlot(title=title, x="step", **{"metric_regex" if isinstance(keys, str) else "y": keys})

    sections = [workspaces.Section(name=name, is_open=True, panels=[lines(*panel) for panel in panels.items()])
                for name, panels in SECTIONS.items()]
    pictures: list[Any] = [reports.MediaBrowser(title=title, media_keys=[key]) for title, key in PICTURES.items()]
    sections.insert(2, workspaces.Section(name="Heat maps", is_open=True, panels=pictures))
    return workspaces.Workspace(entity=entity, project=project, name=NAME, sections=sections)


def save_workspace(entity: str, project: str) -> str:
    """Save the view in the project, a new one each time. -> its address. Raises ConfigError where there is no key.

    The call that saves needs a key and a network, and no test of ours has either: what is saved is tested, that it
    arrives is not.
    """
    workspace = make_workspace(entity, project)
    if not knows_key():
        raise ConfigError("moescale dashboard needs a key of wandb, and there is none here: run wandb login first")
    return str(workspace.save().url)
