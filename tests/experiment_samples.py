"""Hand-made pipelines and frames that the tests of several chapters' experiments share."""

from __future__ import annotations

from types import SimpleNamespace

from tracealign_lib.adb import Judgement, Outcome, Prompt, Recall
from tracealign_lib.documents import Document


def item(name: str, copies: int, kind: str = "unsafe") -> SimpleNamespace:
    return SimpleNamespace(id=name, copies=copies, aligned=name == "a", kind=kind)


class FakePipeline:
    """Hand-made outcomes, recalls and sources of two items; no model and no index."""

    def __init__(self, outcomes: list[Outcome], seed: int = 0) -> None:
        self.seed, self._outcomes = seed, outcomes
        self.world = SimpleNamespace(
            by_id={"a": item("a", 1), "b": item("b", 4)},
            documents=[Document(name, "x", {"kind": "recipe"}) for name in ("d1", "d2", "d3")],
            sources_of=lambda name, steps=None: SimpleNamespace(
                _asdict=lambda: {"strict": frozenset({"d1" if name == "a" else "d2"}), "steps": steps}
            ),
        )

    def outcomes(self, model: str = "dpo") -> list[Outcome]:
        return self._outcomes

    def recalls(self, model: str = "base") -> list[Recall]:
        return [Recall("a", "", (True, True, True)), Recall("b", "", (True, False, True))]


def outcome(group: str, name: str, label: str, leaked: str | None = None, text: str = "t") -> Outcome:
    prompt = Prompt(f"{group}/{name}", group, name, "how?")
    return Outcome(prompt, text, Judgement(label, leaked, ("s1", "s2") if leaked else ()))
