"""What a solution looks like: loss surfaces, curvature, sharpness, FLOPs. Works on any pytree of parameters."""

from s2sam_jax.analysis.flops import layer_flops as layer_flops
from s2sam_jax.analysis.flops import masked_flops as masked_flops
from s2sam_jax.analysis.flops import training_flops as training_flops
from s2sam_jax.analysis.hessian import Spectrum as Spectrum
from s2sam_jax.analysis.hessian import hessian_spectrum as hessian_spectrum
from s2sam_jax.analysis.hessian import hessian_trace as hessian_trace
from s2sam_jax.analysis.hessian import hvp as hvp
from s2sam_jax.analysis.hessian import top_eigenvalues as top_eigenvalues
from s2sam_jax.analysis.sharpness import gradient_difference_ratio as gradient_difference_ratio
from s2sam_jax.analysis.sharpness import sam_sharpness as sam_sharpness
from s2sam_jax.analysis.surface import error_barrier as error_barrier
from s2sam_jax.analysis.surface import filter_normalized_directions as filter_normalized_directions
from s2sam_jax.analysis.surface import loss_surface as loss_surface
from s2sam_jax.analysis.surface import roughness as roughness
