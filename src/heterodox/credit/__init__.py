"""Which parameter is to blame: one file per credit rule."""

from heterodox.credit.backprop import Backprop
from heterodox.credit.direct_feedback import DirectFeedback
from heterodox.credit.equilibrium.bptt import BPTT
from heterodox.credit.equilibrium.implicit import Implicit
from heterodox.credit.equilibrium.propagation import Equilibrium
from heterodox.credit.feedback_alignment import FeedbackAlignment
from heterodox.credit.head_only import HeadOnly
from heterodox.credit.kolen_pollack import KolenPollack
from heterodox.credit.meta_critic import MetaCritic
from heterodox.credit.sign_symmetry import SignSymmetry

__all__ = [
    "BPTT",
    "Backprop",
    "DirectFeedback",
    "Equilibrium",
    "FeedbackAlignment",
    "HeadOnly",
    "Implicit",
    "KolenPollack",
    "MetaCritic",
    "SignSymmetry",
]
