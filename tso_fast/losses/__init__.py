"""Preference losses: pure functions from ``PairLogprobs`` to one loss per pair.

Reduction, scaling and logging belong to the caller. A new loss is a function and a row in ``LOSSES``, here or from
outside::

    def mean_gap(pairs: PairLogprobs, *, beta: float = 0.1) -> torch.Tensor:
        gap = pairs.chosen / pairs.num_chosen_tokens - pairs.rejected / pairs.num_rejected_tokens
        return torch.nn.functional.softplus(-beta * gap)

    LOSSES["mean_gap"] = Loss(mean_gap, title="mean gap", needs_reference=False, takes_labels=False)
"""

from __future__ import annotations

from tso_fast.losses.pairwise import apo_down as apo_down
from tso_fast.losses.pairwise import apo_zero as apo_zero
from tso_fast.losses.pairwise import bco as bco
from tso_fast.losses.pairwise import bdpo as bdpo
from tso_fast.losses.pairwise import cdpo as cdpo
from tso_fast.losses.pairwise import clipped_sides as clipped_sides
from tso_fast.losses.pairwise import dpo as dpo
from tso_fast.losses.pairwise import dpop as dpop
from tso_fast.losses.pairwise import dual_clip as dual_clip
from tso_fast.losses.pairwise import hinge as hinge
from tso_fast.losses.pairwise import ipo as ipo
from tso_fast.losses.pairwise import margin_dpo as margin_dpo
from tso_fast.losses.pairwise import nca as nca
from tso_fast.losses.pairwise import robust as robust
from tso_fast.losses.pairwise import rpo_sft as rpo_sft
from tso_fast.losses.pairwise import soft_ce as soft_ce
from tso_fast.losses.pairwise import sppo as sppo
from tso_fast.losses.reference_free import orpo as orpo
from tso_fast.losses.reference_free import sft as sft
from tso_fast.losses.reference_free import simpo as simpo
from tso_fast.losses.reference_free import slic as slic
from tso_fast.losses.rows import FURTHER_INPUTS as FURTHER_INPUTS
from tso_fast.losses.rows import Loss as Loss
from tso_fast.losses.rows import LossFunction as LossFunction
from tso_fast.losses.several import mrpo as mrpo
from tso_fast.losses.several import selm as selm
from tso_fast.losses.several import srpo as srpo
from tso_fast.losses.table import LOSSES as LOSSES
from tso_fast.losses.table import find_loss as find_loss
from tso_fast.losses.table import loss_options as loss_options
from tso_fast.losses.table import resolve_loss as resolve_loss
from tso_fast.losses.table import scaled_mean as scaled_mean
from tso_fast.losses.table import weighted_sum as weighted_sum
from tso_fast.losses.tokens import bmc as bmc
from tso_fast.losses.tokens import humanline as humanline
from tso_fast.losses.tokens import inverse_q as inverse_q
