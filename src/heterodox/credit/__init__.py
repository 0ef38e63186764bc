"""Which parameter is to blame: one file per credit rule."""

from heterodox.credit.backprop import Backprop
from heterodox.credit.direct_feedback import DirectFeedback
from heterodox.credit.feedback_alignment import FeedbackAlignment
from heterodox.credit.head_only import HeadOnly
from heterodox.credit.kolen_pollack import KolenPollack
from heterodox.credit.sign_symmetry import SignSymmetry

__all__ = ["Backprop", "DirectFeedback", "FeedbackAlignment", "HeadOnly", "KolenPollack", "SignSymmetry"]
