"""Sharpness-aware and sparse training as optax gradient transformations."""

from s2sam_jax import analysis as analysis
from s2sam_jax import methods as methods
from s2sam_jax._batch_stats import recalibrate_batch_stats as recalibrate_batch_stats
from s2sam_jax._channels import ChannelGroup as ChannelGroup
from s2sam_jax._channels import Slice as Slice
from s2sam_jax._channels import channel_masks as channel_masks
from s2sam_jax._masks import SparseState as SparseState
from s2sam_jax._masks import apply_masks as apply_masks
from s2sam_jax._masks import check_masks as check_masks
from s2sam_jax._masks import get_masks as get_masks
from s2sam_jax._masks import set_masks as set_masks
from s2sam_jax._masks import update_masks as update_masks
from s2sam_jax._materialize import Materialized as Materialized
from s2sam_jax._materialize import materialize as materialize
from s2sam_jax._nm_pack import NMPacked as NMPacked
from s2sam_jax._nm_pack import nm_pack as nm_pack
from s2sam_jax._nm_pack import nm_unpack as nm_unpack
from s2sam_jax._s2sam import S2SAMState as S2SAMState
from s2sam_jax._s2sam import perturb as perturb
from s2sam_jax._s2sam import s2sam as s2sam
from s2sam_jax._s2sam_wrapper import S2SAMWrapperState as S2SAMWrapperState
from s2sam_jax._s2sam_wrapper import eval_params as eval_params
from s2sam_jax._s2sam_wrapper import s2sam_wrapper as s2sam_wrapper
from s2sam_jax._sam import SAMState as SAMState
from s2sam_jax._sam import sam as sam
from s2sam_jax._select import select as select
from s2sam_jax._sparsify import sparsify as sparsify
from s2sam_jax._sparsity import erdos_renyi as erdos_renyi
from s2sam_jax._sparsity import erdos_renyi_kernel as erdos_renyi_kernel
from s2sam_jax._sparsity import uniform as uniform
from s2sam_jax._ssam import SSAMState as SSAMState
from s2sam_jax._ssam import empirical_fisher as empirical_fisher
from s2sam_jax._ssam import ssam as ssam
from s2sam_jax._structure import NM as NM
from s2sam_jax._structure import Block as Block
from s2sam_jax._structure import Channel as Channel
from s2sam_jax._structure import Unstructured as Unstructured
from s2sam_jax._train import TrainState as TrainState
from s2sam_jax._train import make_train_step as make_train_step
from s2sam_jax._types import Every as Every
from s2sam_jax._types import MaskInputs as MaskInputs
from s2sam_jax._types import MaskUpdate as MaskUpdate
from s2sam_jax._types import SparseMethod as SparseMethod

__version__ = "0.1.0"
