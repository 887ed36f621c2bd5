"""Paper search: find all papers that answer a question, on AutoScholarQuery and RealScholarQuery (He et al., 2025)."""

from steppo.envs.paper_search.env import PaperSearchEnv
from steppo.envs.paper_search.papers import LocalPapers, Paper, Papers
from steppo.envs.paper_search.relevance import CrossEncoderRelevance, ExactAnswers, Relevance
from steppo.envs.paper_search.service import PaperService

__all__ = [
    "CrossEncoderRelevance",
    "ExactAnswers",
    "LocalPapers",
    "Paper",
    "PaperSearchEnv",
    "PaperService",
    "Papers",
    "Relevance",
]
