"""How relevant a paper is to a question: what the reward is made of, and what the policy is shown."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from steppo.envs.paper_search.papers import Paper
from steppo.errors import ConfigError, said

# sentence-transformers is imported where it is used: it is an extra, and imports torch.


class Relevance(ABC):
    """Scores papers. The constructor only stores settings; ``start`` opens it, in a copy of each worker process."""

    def prepare(self) -> None:
        """Looks whether all is there, once per machine. Raises ``ConfigError``."""

    def start(self) -> None:
        """Loads what it needs. What it assigns is shared by all episodes of the process."""

    @abstractmethod
    def scores(self, question: str, papers: Sequence[Paper], answers: AbstractSet[str]) -> list[float]:
        """One number from 0 to 1 for each paper.

        Args:
            question: What is looked for.
            papers: At least one.
            answers: Ids of the papers that are right.
        """


class ExactAnswers(Relevance):
    """1 for an answer, 0 for any other. The policy is shown it, and so learns at once which papers are right."""

    def scores(self, question: str, papers: Sequence[Paper], answers: AbstractSet[str]) -> list[float]:
        return [float(paper.id in answers) for paper in papers]


class CrossEncoderRelevance(Relevance):
    """A model that reads question and paper together, by sentence-transformers: ``pip install "steppo[dense]"``.

    It knows no answers. Its one output goes through a sigmoid.

    Args:
        model: Name on Hugging Face's hub, or a folder.
        device: ``cpu``, ``cuda``, ... Each worker process has a model of its own.
        batch_size: Papers read at once.
    """

    def __init__(
        self, model: str = "cross-encoder/ms-marco-MiniLM-L6-v2", device: str = "cpu", batch_size: int = 32
    ) -> None:
        self.model = model
        self.device = device
        self.batch_size = batch_size

    def prepare(self) -> None:
        self._loaded()

    def start(self) -> None:
        self._model = self._loaded()

    def scores(self, question: str, papers: Sequence[Paper], answers: AbstractSet[str]) -> list[float]:
        pairs = [(question, f"{paper.title}\n{paper.abstract}".strip()) for paper in papers]
        return [float(score) for score in self._model.predict(pairs, batch_size=self.batch_size, show_progress_bar=False)]

    def _loaded(self) -> Any:
        try:
            import torch
            from sentence_transformers import CrossEncoder
        except ImportError:
            raise ConfigError('CrossEncoderRelevance needs sentence-transformers: pip install "steppo[dense]"') from None
        try:
            model = CrossEncoder(self.model, device=self.device, activation_fn=torch.nn.Sigmoid())
        except Exception as error:
            raise ConfigError(f"CrossEncoderRelevance: cannot load the model {self.model}: {said(error)}") from None
        if model.num_labels != 1:
            raise ConfigError(f"CrossEncoderRelevance: {self.model} gives {model.num_labels} numbers for a pair, not one")
        return model
